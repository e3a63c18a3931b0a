# SPDX-License-Identifier: Apache-2.0
"""What the KV of a server depends on beside its tokens: the weights, and how the KV is laid out.

KV that outlives a server is right only in a server with the same weights and the same layout. vLLM
names the files of its tier by the model's name, so new weights in the same folder would read the KV
of the old ones. The facts that are gathered here tell the two apart. They need no weights in
memory, and only samples of their files are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from vllm_stateful.compat import probe
from vllm_stateful.config import process_config

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
"""The endings of files that hold weights."""

SCALES = frozenset({"hf_quant_config.json", "quantize_config.json"})
"""Files that say how weights and KV are quantized."""

NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
"""What is read of a file of weights: so many pieces of this length, from its start to its end."""

CACHE_FACTS = (
    "cache_dtype",
    "kv_cache_dtype_skip_layers",
    "kv_cache_layout",
    "kv_sharing_fast_prefill",
    "mamba_cache_dtype",
    "mamba_cache_mode",
    "mamba_ssm_cache_dtype",
    "replayssm_buffer_len",
    "sliding_window",
    "swa_bounded_replay",
    "use_replayssm",
)
"""Fields of vLLM's ``CacheConfig`` that change what KV holds, not how much there is of it."""

ENVIRONMENT = "VLLM_ROCM_"
"""Variables that begin so choose kernels, and layouts of KV with them."""

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
        weights: the operator's own name of weights that lie in no folder.

    Raises:
        ValueError: the weights lie in no folder, and the operator has named none.
    """
    from vllm.platforms import current_platform

    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    capability = current_platform.get_device_capability()
    cache = vllm_config.cache_config
    return {
        "vllm": probe.vllm_version(),
        "device": [current_platform.device_name, None if capability is None else str(capability)],
        "attention": {
            name: _plain(value) for name, value in vars(vllm_config.attention_config).items()
        },
        "kernels": process_config().attention,
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)
        },
        "kv": {name: _plain(getattr(cache, name)) for name in CACHE_FACTS},
        "model": _model_facts(vllm_config, vllm_config.model_config, weights),
        "draft": None if draft is None else _model_facts(vllm_config, draft, weights),
    }


def digest_of(facts: dict[str, Any]) -> str:
    """A name for facts: 16 hex characters."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _model_facts(vllm_config: Any, model: Any, weights: str | None) -> dict[str, Any]:
    shape = model.hf_config.to_dict()
    shape.pop("transformers_version", None)
    text = json.dumps(_plain(shape), sort_keys=True)
    return {
        "name": model.model,
        "revision": model.revision,
        "dtype": str(model.dtype),
        "max_model_len": model.max_model_len,  # some ropes are chosen by it
        "quantization": [model.quantization, _plain(model.quantization_config)],
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "weights": _weights(vllm_config.load_config, model, weights),
    }


def _plain(value: Any) -> Any:
    """A JSON value that is the same in each process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _weights(load: Any, model: Any, named: str | None) -> Any:
    if load.load_format == "dummy":
        return ["dummy", model.seed]
    folder = _folder_of(load, model)
    files = [folder] if folder is not None and folder.is_file() else []
    if folder is not None and folder.is_dir():
        files = sorted(folder.iterdir())  # vLLM loads from no folder below it
    if any(path.suffix in WEIGHTS for path in files):
        return [_file(path) for path in files if path.suffix in WEIGHTS or path.name in SCALES]
    if named is not None:
        return named
    raise ValueError(
        f"the weights of {model.model} are in no folder of this machine: name them yourself, "
        'with "weights" in the configuration of the tier (docs/restart.md)'
    )


def _folder_of(load: Any, model: Any) -> Path | None:
    """The folder or the file of the weights; None if they are in none that is known."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(model.model).exists():
        return Path(model.model)
    try:
        found = snapshot_download(
            model.model, revision=model.revision, cache_dir=load.download_dir, local_files_only=True
        )
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return Path(found)


def _file(path: Path) -> list[str | int]:
    """A file of weights: its name and what it holds, or else a sample, its size, and its time.

    The cache of Hugging Face names a file by its content, and links to it.
    """
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs":
        return [path.name, target.name]
    stat = path.stat()
    sample = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(NUM_SAMPLES):
            file.seek(stat.st_size * number // NUM_SAMPLES)
            sample.update(file.read(SAMPLE_BYTES))
    return [path.name, stat.st_size, stat.st_mtime_ns, sample.hexdigest()]
