# SPDX-License-Identifier: Apache-2.0
"""The servers that the dashboard is shown: small models, each with what its metrics need."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.demo.dashboard import loads
from benchmarks.demo.servers import ServerOptions
from benchmarks.models import CACHE, published, smollm2, tiny
from benchmarks.models.shapes import FAMILIES

BLOCK_SIZE, MAX_LEN = 32, 1792
TIER_BYTES = 1 << 20
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_VOCAB = 49152
"""Of SmolLM2's tokenizer."""


@dataclass(frozen=True)
class Kind:
    """One server and the load that is played on it."""

    name: str
    model: Callable[[], Path]
    arguments: tuple[str, ...]
    play: Callable[[str], None]

    def options(self) -> ServerOptions:
        """What `vllm serve` gets beside the arguments; a model that is missing is made."""
        return ServerOptions(self.model(), "float32", 1, BLOCK_SIZE, MAX_LEN)


def windows_model() -> Path:
    """A model with sliding windows, made-up weights and SmolLM2's tokenizer."""
    path = CACHE / "dummy-windows"
    if not path.is_dir():
        tokenizer = smollm2.ensure()
        config = FAMILIES["gemma3"].config | {"vocab_size": _VOCAB}
        with published(path) as out:
            (out / "config.json").write_text(json.dumps(config))
            for file in _TOKENIZER:
                shutil.copy(tokenizer / file, out)
    return path


def tier_arguments(files: Path) -> tuple[str, ...]:
    """Of a server with vLLM's offload tier, which is too small, on a CPU."""
    extra = {
        "cpu_bytes_to_use": TIER_BYTES,
        "spec_name": "HostTieringSpec",
        "spec_module_path": "benchmarks.reliability.host_tier",
        "secondary_tiers": [{"type": "fs", "root_dir": str(files)}],
        "eviction_policy": "StatefulCachePolicy",
        "cache_policy_module_path": "vllm_stateful.adapters.offload_policy",
    }
    config = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    return ("--kv-transfer-config", json.dumps(config | {"kv_connector_extra_config": extra}))


def kinds(out: Path) -> list[Kind]:
    """The servers, one after the other; `out` is a folder for files of theirs."""
    common = ("--plugin", "stateful", "--enforce-eager", "--distributed-executor-backend", "uni")
    few_blocks = ("--num-gpu-blocks-override", "64")
    agents = (
        *("--stateful-profile", "fast", "--stateful-tool-call-check", "strict"),
        *("--stateful-response-cache-bytes", "16M", "--stateful-verify-tokens", "0.5"),
        *("--long-prefill-token-threshold", "128", "--num-gpu-blocks-override", "128"),
    )
    off = ("--no-enable-prefix-caching",)
    tier = (*few_blocks, *tier_arguments(out.resolve() / "tier"))
    return [
        Kind("agents", smollm2.ensure, (*common, *agents), loads.play_agents),
        Kind("windows", windows_model, (*common, "--load-format", "dummy"), loads.play_turns),
        Kind("tier", tiny.ensure_tiny, (*common, *tier), loads.play_turns),
        Kind("cores", tiny.ensure_tiny, (*common, "--data-parallel-size", "2"), loads.play_many),
        Kind("off", tiny.ensure_tiny, (*common, *off), loads.play_many),
    ]
