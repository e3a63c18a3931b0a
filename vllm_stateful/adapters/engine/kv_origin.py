# SPDX-License-Identifier: Apache-2.0
"""What the KV of a server depends on beside its tokens: the weights, and how the KV is laid out.

KV that outlives a server is right only in a server with the same weights and the same layout. vLLM
names the files of its tier by the model's name, so new weights in the same folder would read the KV
of the old ones. The facts that are gathered here tell the two apart. They need no weights in
memory, and no file of weights is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from vllm_stateful.compat import probe
from vllm_stateful.config import process_config

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
"""The endings of files that hold weights."""

_building: ContextVar[Any] = ContextVar("building", default=None)


@contextmanager
def building(vllm_config: Any) -> Iterator[None]:
    """A scheduler with this configuration is being built, and the tiers of its connector with it.

    vLLM tells a tier only a part of the configuration.
    """
    token = _building.set(vllm_config)
    try:
        yield
    finally:
        _building.reset(token)


def configuration() -> Any:
    """vLLM's configuration of the scheduler that is being built; None outside of `building`."""
    return _building.get()


def kv_facts(vllm_config: Any, weights: str | None = None) -> dict[str, Any]:
    """What the KV depends on, as JSON values. Equal in two servers: each may read the other's KV.

    Args:
        vllm_config: the server's configuration.
        weights: the operator's own name of the weights; None: their files say it.

    Raises:
        ValueError: the weights lie in no folder, and the operator has named none.
    """
    from vllm.platforms import current_platform

    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    capability = current_platform.get_device_capability()
    return {
        "vllm": probe.vllm_version(),
        "device": [current_platform.device_name, None if capability is None else str(capability)],
        "attention": [str(vllm_config.attention_config.backend), process_config().attention],
        "kv_dtype": str(vllm_config.cache_config.cache_dtype),
        "kv_layout": str(vllm_config.cache_config.kv_cache_layout),
        "model": _model_facts(vllm_config, vllm_config.model_config, weights),
        "draft": None if draft is None else _model_facts(vllm_config, draft, weights),
    }


def digest_of(facts: dict[str, Any]) -> str:
    """A name for facts: 16 hex characters."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _model_facts(vllm_config: Any, model: Any, weights: str | None) -> dict[str, Any]:
    shape = json.dumps(model.hf_config.to_dict(), sort_keys=True, default=str)
    return {
        "name": model.model,
        "revision": model.revision,
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "config": hashlib.sha256(shape.encode()).hexdigest(),
        "weights": weights or _weights(vllm_config.load_config, model),
    }


def _weights(load: Any, model: Any) -> Any:
    from huggingface_hub import try_to_load_from_cache

    if load.load_format == "dummy":
        return ["dummy", model.seed]
    folder = Path(model.model)
    if not folder.exists() and "://" not in model.model:
        cached = try_to_load_from_cache(
            model.model, "config.json", cache_dir=load.download_dir, revision=model.revision
        )
        folder = Path(cached).parent if isinstance(cached, str) else folder
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    found = [_file(path, folder) for path in files if path.suffix in WEIGHTS]
    if not found:
        raise ValueError(
            f"the weights of {model.model} are in no folder of this machine: name them yourself, "
            'with "weights" in the configuration of the tier (docs/restart.md)'
        )
    return found


def _file(path: Path, folder: Path) -> list[str | int]:
    """A file of weights: its name and what it holds, or else its size and its time of change.

    The cache of Hugging Face names a file by its content, and links to it.
    """
    name = str(path.relative_to(folder))
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs":
        return [name, target.name]
    stat = path.stat()
    return [name, stat.st_size, stat.st_mtime_ns]
