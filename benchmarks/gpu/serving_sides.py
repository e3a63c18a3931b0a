# SPDX-License-Identifier: Apache-2.0
"""The servers of `benchmarks.gpu.serving`: a process group for each side."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.limited import TAIL_CHARS, end_group
from benchmarks.gpu.serving_client import HOST
from benchmarks.models import TOOLS_TEMPLATE
from benchmarks.models.dummy import SHAPES, write_config
from benchmarks.ports import free_port

STOCK, PLUGIN = "stock", "plugin"
ATTENTION, STOCK_DRAFTS, PLUGIN_DRAFTS = "plugin+attention", "stock+drafts", "plugin+drafts"
ALL_SIDES = (STOCK, PLUGIN, PLUGIN_DRAFTS, STOCK_DRAFTS, ATTENTION)
MODEL_NAME = "replay"
MOST_SEQS, STEP_TOKENS = 32, 8192
GRAPH_SIZES = (1, 2, 4, 6, 9, 12, 16, 24, 36, 48, 64, 72, 96, 144)
"""Up to 16 requests with 8 drafts each."""

BLOCK = 16
SPARE_TOKENS = 4096
OVERHEAD_BYTES = int(4.3e9)
"""Of a server, beside weights and cache: the CUDA context, activations, graphs; estimated."""

MOST_OF_MEMORY = 0.95
EOS = 2  # of SmolLM2 too
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

# Stock drafts as its look-up was best in benchmarks/details/drafts.md, the plugin as in
# docs/speculation.md.
_FROM_PROMPT = {"num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 5}
_ON_DEVICE = {
    "method": "ngram_gpu",
    "num_speculative_tokens": 8,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 16,
    "num_speculative_tokens_per_batch_size": [[1, 8, 8], [9, 32, 3]],
}
_IN_ENGINE = {
    "method": "custom_class",
    "num_speculative_tokens": 16,
    "model": "vllm_stateful.adapters.speculation.SessionDrafter",
}


class SideFailedError(RuntimeError):
    """A server ended or did not do what it was asked; the message holds the end of its log."""


@dataclass(frozen=True)
class Model:
    """A shape with as many layers as fit.

    Attributes:
        max_len: Tokens of the longest request; the cache of every side holds a little more.
        is_on_gpu: Else vLLM's build for CPUs, in float32 and without compiling.
    """

    shape: str
    layers: int
    max_len: int
    is_on_gpu: bool

    @property
    def cache_bytes(self) -> int:
        """Of one side."""
        return (self.max_len + SPARE_TOKENS) * self.layers * bytes_of_token(self.shape)

    def write(self, folder: Path, tokenizer: Path) -> None:
        """A config, and the tokenizer from another folder; vLLM makes up the weights."""
        folder.mkdir(parents=True)
        vocabulary = max(SHAPES[self.shape]["vocab_size"], 49152)
        write_config(
            folder,
            self.shape,
            num_hidden_layers=self.layers,
            max_position_embeddings=self.max_len,
            vocab_size=vocabulary,
        )
        for name in _TOKENIZER:
            shutil.copy(tokenizer / name, folder)


def bytes_of_token(shape: str) -> int:
    """Of one token in one layer of the cache, in bfloat16."""
    sizes = SHAPES[shape]
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    return 2 * sizes["num_key_value_heads"] * head * 2


def fitting_layers(shape: str, memory: int, num_sides: int, max_len: int) -> int:
    """How many layers each side may have where so many share a device; the shape's at most.

    Raises:
        ValueError: not one fits.
    """
    sizes = SHAPES[shape]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    of_token = bytes_of_token(shape)
    layer = 2 * (2 * hidden * hidden + 3 * hidden * inner) + of_token // 2 * hidden
    layer += (max_len + SPARE_TOKENS) * of_token
    ends = 2 * 2 * sizes["vocab_size"] * hidden
    left = memory * MOST_OF_MEMORY / num_sides - ends - OVERHEAD_BYTES
    fitting = min(int(left // layer), sizes["num_hidden_layers"])
    if fitting < 1:
        raise ValueError(f"{num_sides} sides do not fit into {memory / 1e9:.0f} GB")
    return fitting


def side_arguments(side: str, *, is_on_gpu: bool) -> list[str]:
    """What one side has to itself."""
    made: list[str] = []
    if side.startswith(PLUGIN):
        made += ["--plugin", "stateful", "--stateful-strict"]
    if side == ATTENTION:
        made += ["--stateful-attention", "on"]
    if side == STOCK_DRAFTS:
        method = {"method": "ngram_gpu" if is_on_gpu else "ngram"}
        made += ["--speculative-config", json.dumps(method | _FROM_PROMPT)]
    if side == PLUGIN_DRAFTS:
        made += ["--speculative-config", json.dumps(_ON_DEVICE if is_on_gpu else _IN_ENGINE)]
    return made


def common_arguments(model: Model) -> list[str]:
    """What all sides have in common."""
    made = ["--served-model-name", MODEL_NAME, "--load-format", "dummy"]
    made += ["--max-model-len", str(model.max_len), "--max-num-seqs", str(MOST_SEQS)]
    made += ["--max-num-batched-tokens", str(STEP_TOKENS), "--enable-prefix-caching"]
    made += ["--enable-prompt-tokens-details", "--chat-template", str(TOOLS_TEMPLATE)]
    if not model.is_on_gpu:
        extension = "benchmarks.serving.pinned_ids.PinnedIds"
        made += ["--dtype", "float32", "--enforce-eager", "--block-size", "32"]
        return [*made, "--worker-extension-cls", extension]
    sizes = json.dumps({"cudagraph_capture_sizes": GRAPH_SIZES})
    made += ["--dtype", "bfloat16", "--compilation-config", sizes, "--block-size", str(BLOCK)]
    # The share is only asked for when a server starts: others that start beside it take memory too.
    made += ["--kv-cache-memory-bytes", str(model.cache_bytes), "--gpu-memory-utilization", "0.05"]
    return [*made, "--worker-extension-cls", "benchmarks.serving.pinned_ids_v2.PinnedIds"]


def environment(side: str, scratch: Path, *, is_on_gpu: bool) -> dict[str, str]:
    """Of one server: a compile cache of its own, and no plugin where it is not asked for."""
    made = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_STATEFUL")}
    made |= {
        "VLLM_CACHE_ROOT": str(scratch / f"cache-{side}"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
        "NUMBA_THREADING_LAYER": "workqueue",
    }
    if not is_on_gpu:
        made |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        made |= {"OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parents[2])
    made["PYTHONPATH"] = os.pathsep.join(filter(None, [root, made.get("PYTHONPATH", "")]))
    return made


@dataclass
class Side:
    """One server.

    Attributes:
        ready_s: Seconds from its start to its first answer; None: there was none yet.
        failed: Why it plays no more; empty: it plays.
    """

    name: str
    port: int
    log: Path
    process: subprocess.Popen[bytes] = field(repr=False)
    began: float
    ready_s: float | None = None
    failed: str = ""

    def is_ready(self) -> bool:
        """Whether it answers by now.

        Raises:
            SideFailedError: it has ended.
        """
        self.check_alive()
        if self.ready_s is None and self._get("/health", 2) is not None:
            self.ready_s = time.monotonic() - self.began
        return self.ready_s is not None

    def check_alive(self) -> None:
        """Raise SideFailedError where it has ended."""
        code = self.process.poll()
        if code is not None:
            raise SideFailedError(self.report(f"ended with exit status {code}"))

    def report(self, problem: str) -> str:
        """The problem and the end of the log."""
        return f"{problem}: {self.log.read_text(errors='replace')[-TAIL_CHARS:]}"

    def metrics(self, seconds: float = 10) -> dict[str, float]:
        """Counters and gauges at /metrics, labels summed up but for the plugin's own.

        Raises:
            SideFailedError: they did not come.
        """
        text = self._get("/metrics", seconds)
        if text is None:
            raise SideFailedError(self.report("no metrics"))
        found: dict[str, float] = {}
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            if not name or name.startswith("#") or "_bucket" in name:
                continue
            key = name if name.startswith("vllm_stateful") else name.partition("{")[0]
            found[key] = found.get(key, 0.0) + float(value)
        return found

    def forget(self, seconds: float = 5) -> bool:
        """Empty its cache, sessions included; whether it did."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            text = self._get("/reset_prefix_cache", seconds, data=b"")
            if text is not None and json.loads(text or "{}").get("success"):
                return True
            time.sleep(0.2)
        return False

    def said(self) -> list[str]:
        """What the log says of the plugin, of the model runner and of memory."""
        words = ("stateful", "model runner", "KV cache size", "sync scheduling")
        lines = self.log.read_text(errors="replace").splitlines()
        wanted = [line for line in lines if any(word in line for word in words)]
        return [line[-260:] for line in wanted if "non-default args" not in line][:12]

    def close(self) -> None:
        """End it and all that it started."""
        end_group(self.process)

    def _get(self, path: str, seconds: float, data: bytes | None = None) -> str | None:
        try:
            url = f"http://{HOST}:{self.port}{path}"
            with urllib.request.urlopen(url, data=data, timeout=seconds) as answer:
                text: str = answer.read().decode()
                return text
        except (urllib.error.URLError, OSError):  # not yet, or not any more: the caller decides
            return None


def start(
    name: str, model: Model, folder: Path, scratch: Path, logs: Path, more: Sequence[str] = ()
) -> Side:
    """Start one server; it is not ready yet."""
    port = free_port()
    log = logs / f"{name}.log"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--host", HOST, "--port", str(port), *common_arguments(model)]
    command += [*side_arguments(name, is_on_gpu=model.is_on_gpu), *more]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(name, scratch, is_on_gpu=model.is_on_gpu),
            start_new_session=True,
        )
    return Side(name, port, log, process, time.monotonic())


def device() -> Mapping[str, Any] | None:
    """Name and memory of the first GPU, without a context on it; None: there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if driver.cuInit(0):
        return None
    name, memory = ctypes.create_string_buffer(128), ctypes.c_size_t()
    problem = driver.cuDeviceGetName(name, len(name), 0)
    if problem or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), 0):
        raise RuntimeError("there is a GPU that does not say its name or memory")
    return {"name": name.value.decode(), "memory": memory.value}
