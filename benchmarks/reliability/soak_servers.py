# SPDX-License-Identifier: Apache-2.0
"""The two servers of the soak: the one under test, and stock vLLM to ask what is right.

Stock vLLM keeps no cache and answers one request at a time, so nothing but the prompt can matter.

LoRA: adapters ``a`` and ``b`` are loaded in the stock server. vLLM refuses to change adapters at
run time with several API servers, so there are two forms: ``fixed``, with ``a`` and ``b`` loaded at
the start of two API servers, and ``swap``, one API server where ``swap`` is what was loaded last.
With adapters nobody asks for the model without one: vLLM 0.32 on a CPU, stock too, gives the rows
without an adapter the last one (index -1) when a step also has rows with one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from benchmarks.models import TOOLS_TEMPLATE, tiny
from benchmarks.serving.servers import MODEL_NAME, PLUGIN, STOCK, Server, Settings

ADAPTERS = ("a", "b")
SWAP = "swap"
MAX_MODEL_LEN = 2048
BLOCK = 32
NUM_BLOCKS = 160
"""5,120 tokens: less than the requests in flight need together."""

RANK = 4
DRAFTS = {
    "method": "custom_class",
    "num_speculative_tokens": 8,
    "model": "vllm_stateful.adapters.speculation.SessionDrafter",
}
SMALL_CACHES = ("--stateful-render-bytes", "8M", "--stateful-base-bytes", "2M")
SMALL_CACHES += ("--stateful-idle-seconds", "60")
"""Small and short, so that all is full long before memory is looked at."""

_ENTRY = re.compile(r"^(?:\(([^)]*)\) )?(?:(DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+ \S+ (\[\S+\]))?")
_BAD = re.compile(r"Traceback \(most recent call last\)|\bERROR\b|\bCRITICAL\b")
KNOWN_ENTRIES = (
    # Clients are told so, and it is right; vLLM logs each with its traceback.
    re.compile(r"http\.py:\d+\] .*HTTPException: 404: no resident session", re.DOTALL),
    # A tool call that `max_tokens` cut.
    re.compile(r"hermes_tool_parser\.py:\d+\] Error in extracting tool call"),
)


@dataclass(frozen=True)
class Options:
    """What can be chosen about the server under test.

    Attributes:
        lora: adapters, if any, and whether they change.
        has_drafts: with drafts from sessions.
        stock_api_servers: of the stock server, which is asked one by one.
    """

    lora: Literal["none", "fixed", "swap"] = "none"
    has_drafts: bool = True
    response_cache: str = "64M"
    stock_api_servers: int = 1

    @property
    def api_servers(self) -> int:
        """vLLM's ``--api-server-count``."""
        return 1 if self.swaps else 2

    @property
    def has_lora(self) -> bool:
        return self.lora != "none"

    @property
    def swaps(self) -> bool:
        """Whether the adapter behind one name changes."""
        return self.lora == "swap"


class SoakServer(Server):
    """A server that knows its processes."""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._process.poll() if self._process else None

    def processes(self) -> dict[str, int]:
        """Process ids by what they are: main, api 0, api 1, engine, worker."""
        found: dict[str, int] = {}
        try:
            root = psutil.Process(self.pid)
            everyone = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return found
        for process in everyone:
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:  # it has just ended
                continue
            name = _name(title, process.pid == self.pid)
            if name is None or "resource_tracker" in title:
                continue
            found[f"{name} {sum(n.startswith(name) for n in found)}"] = process.pid
        return found

    def bad_entries(self) -> list[str]:
        """Errors in the log that are not known to be right, each with all its lines."""
        entries: list[str] = []
        last = None
        for line in self.log.read_text(errors="replace").splitlines():
            found = _ENTRY.match(line)
            kind = found.groups() if found else None
            if entries and kind == last and kind and kind[1] in ("ERROR", "CRITICAL"):
                is_new = "caught" in line or "Error in" in line
            else:
                is_new = True
            if is_new:
                entries.append(line)
            else:
                entries[-1] += f"\n{line}"
            last = kind
        bad = [entry for entry in entries if _BAD.search(entry)]
        return [entry for entry in bad if not any(known.search(entry) for known in KNOWN_ENTRIES)]


def _name(title: str, is_root: bool) -> str | None:
    for word, name in (("enginecore", "engine"), ("apiserver", "api"), ("worker", "worker")):
        if f"vllm::{word}" in title.lower():
            return name
    return "main" if is_root else None


def write_adapter(path: Path, seed: int) -> Path:
    """A LoRA adapter with random weights, strong enough that answers differ by it."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((tiny.DEFAULT / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    sizes = {
        "q_proj": config["num_attention_heads"] * head,
        "v_proj": config["num_key_value_heads"] * head,
    }
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in sizes.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{key}.lora_A.weight"] = 0.3 * torch.randn(RANK, hidden, generator=random)
            weights[f"{key}.lora_B.weight"] = 0.3 * torch.randn(size, RANK, generator=random)
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, str(path / "adapter_model.safetensors"))
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": MODEL_NAME,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(sizes),
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(about))
    return path


def settings(options: Options, adapters: dict[str, Path]) -> Settings:
    """Of both servers."""
    common = ["--chat-template", str(TOOLS_TEMPLATE), "--block-size", str(BLOCK)]
    common += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    plugin = ["--stateful-strict", "--stateful-check-invariants"]
    plugin += ["--stateful-response-cache-bytes", options.response_cache, *SMALL_CACHES]
    plugin += ["--api-server-count", str(options.api_servers)]
    plugin += ["--num-gpu-blocks-override", str(NUM_BLOCKS)]
    if options.has_drafts:
        plugin += ["--speculative-config", json.dumps(DRAFTS)]
    stock = ["--no-enable-prefix-caching"]
    stock += ["--api-server-count", str(options.stock_api_servers)]
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    if options.has_lora:
        modules = ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
        common += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
        stock += modules
        if options.swaps:
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        else:
            plugin += modules
    return Settings(
        max_model_len=MAX_MODEL_LEN,
        arguments=tuple(common),
        kv_gib=1,
        environment=environment,
        side_arguments={PLUGIN: tuple(plugin), STOCK: tuple(stock)},
    )


@contextmanager
def both(
    options: Options, folder: Path, *, has_stock: bool = True
) -> Iterator[dict[str, SoakServer]]:
    """The servers by side, started at once."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {}
    if options.has_lora:
        seeds = enumerate(ADAPTERS, start=1)
        adapters = {name: write_adapter(folder / "lora" / name, seed) for seed, name in seeds}
    made = settings(options, adapters)
    sides = (PLUGIN, STOCK) if has_stock else (PLUGIN,)
    with ExitStack() as stack:
        servers = {}
        for side in sides:
            server = SoakServer(side, tiny.DEFAULT, folder, is_timed=False, settings=made)
            servers[side] = stack.enter_context(server)
        for server in servers.values():
            server.wait_until_ready()
        yield servers


def adapter_path(folder: Path, name: str) -> str:
    """Where `both` wrote an adapter, as a server has to be told."""
    return os.fspath((folder / "lora" / name).resolve())
