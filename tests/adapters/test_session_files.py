# SPDX-License-Identifier: Apache-2.0
"""Which server may read the files of which, and what is removed at a start."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from vllm_stateful.adapters.engine.kv_origin import (
    CACHE_FACTS,
    building,
    configuration,
    digest_of,
    kv_facts,
)
from vllm_stateful.adapters.session_files import (
    FACTS_FILE,
    PART_S,
    SessionFiles,
    prepared,
    remove_broken,
)

SHAPE = {"num_hidden_layers": 2, "rope_theta": 10000.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "tokenizer.json").write_text("{}")
    return made


@pytest.fixture
def config(folder: Path) -> Any:
    """As much of vLLM's configuration as is looked at."""
    return SimpleNamespace(
        model_config=model_config(str(folder)),
        cache_config=SimpleNamespace(**dict.fromkeys(CACHE_FACTS)),
        load_config=SimpleNamespace(load_format="auto", download_dir=None),
        attention_config=SimpleNamespace(backend=None),
        speculative_config=None,
    )


def model_config(name: str) -> Any:
    return SimpleNamespace(
        model=name,
        revision=None,
        dtype="torch.float32",
        max_model_len=8192,
        quantization=None,
        quantization_config=None,
        seed=0,
        hf_config=SimpleNamespace(to_dict=lambda: dict(SHAPE)),
    )


def digest(config: Any, weights: str | None = None) -> str:
    return digest_of(kv_facts(config, weights))


def weights_of(config: Any) -> Path:
    return Path(config.model_config.model) / "model.safetensors"


def set_kv_dtype(config: Any) -> None:
    config.cache_config.cache_dtype = "fp8"


def set_layout(config: Any) -> None:
    config.cache_config.kv_cache_layout = "BLHNC"


def set_backend(config: Any) -> None:
    config.attention_config.backend = "FLASHINFER"


def set_quantization(config: Any) -> None:
    config.model_config.quantization = "fp8"


def set_rope(config: Any) -> None:
    config.model_config.hf_config.to_dict = lambda: {**SHAPE, "rope_theta": 5e5}


def set_draft(config: Any) -> None:
    draft = model_config(config.model_config.model)
    config.speculative_config = SimpleNamespace(draft_model_config=draft)


def set_length(config: Any) -> None:
    """Some ropes are chosen by it."""
    config.model_config.max_model_len = 131072


def set_scales(config: Any) -> None:
    config.model_config.quantization_config = {"kv_cache_scheme": {"num_bits": 8}}


def set_state_dtype(config: Any) -> None:
    config.cache_config.mamba_ssm_cache_dtype = "bfloat16"


def write_again(config: Any) -> None:
    """As many bytes, at the same time: images of containers are built so."""
    time_ns = weights_of(config).stat().st_mtime_ns
    weights_of(config).write_bytes(b"retrain")
    os.utime(weights_of(config), ns=(time_ns, time_ns))


def write_scales(config: Any) -> None:
    (weights_of(config).parent / "hf_quant_config.json").write_text("{}")


def write_more(config: Any) -> None:
    (weights_of(config).parent / "model-2.safetensors").write_bytes(b"")


CHANGES = (
    set_kv_dtype,
    set_layout,
    set_backend,
    set_quantization,
    set_rope,
    set_draft,
    set_length,
    set_scales,
    set_state_dtype,
    write_again,
    write_scales,
    write_more,
)


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_kv_changes_the_folder(
    config: Any, change: Callable[[Any], None]
) -> None:
    before = digest(config)
    change(config)
    assert digest(config) != before


def test_the_same_server_finds_its_folder_again(config: Any) -> None:
    before = digest(config)
    (weights_of(config).parent / "tokenizer.json").write_text("{ }")
    (weights_of(config).parent / "checkpoint-1").mkdir()
    (weights_of(config).parent / "checkpoint-1" / "optimizer.pt").write_bytes(b"")
    config.model_config.hf_config.to_dict = lambda: {**SHAPE, "transformers_version": "6.0"}
    assert digest(config) == before


def test_weights_that_vllm_has_loaded_from_a_hub_are_found(config: Any, tmp_path: Path) -> None:
    """Also in a folder of downloads, which has no configuration of the model."""
    revision = "0" * 40
    repository = tmp_path / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "a1b2").write_bytes(b"weights")
    (repository / "snapshots" / revision).mkdir(parents=True)
    shard = repository / "snapshots" / revision / "model.safetensors"
    shard.symlink_to("../../blobs/a1b2")
    config.model_config.model, config.load_config.download_dir = "org/model", str(tmp_path)
    assert kv_facts(config)["model"]["weights"] == [["model.safetensors", "a1b2"]]


def test_a_name_of_the_operator_does_not_hide_the_files_of_a_draft(config: Any) -> None:
    set_draft(config)
    config.model_config = model_config("s3://bucket/model")
    before = digest(config, "named")
    Path(config.speculative_config.draft_model_config.model, "model.safetensors").write_bytes(b"x")
    assert digest(config, "named") != before


def test_weights_in_the_cache_of_hugging_face_are_known_by_their_content(
    config: Any, tmp_path: Path
) -> None:
    def snapshot(name: str, blob: str) -> str:
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / blob).write_bytes(b"weights")
        made = tmp_path / name / "snapshots" / "1"
        made.mkdir(parents=True)
        (made / "model.safetensors").symlink_to(f"../../blobs/{blob}")
        config.model_config.model = str(made)
        return str(kv_facts(config)["model"]["weights"])

    first = snapshot("first", "a1b2")
    assert snapshot("copied", "a1b2") == first
    assert snapshot("other", "c3d4") != first


def test_weights_that_lie_nowhere_are_named_by_the_operator(config: Any) -> None:
    config.model_config.model = "s3://bucket/model"
    with pytest.raises(ValueError, match='name them yourself, with "weights"'):
        kv_facts(config)
    assert digest(config, "first") != digest(config, "second")
    config.load_config.load_format = "dummy"
    first = digest(config)
    config.model_config.seed = 1
    assert digest(config) != first


def test_the_configuration_is_known_only_while_a_scheduler_is_built(config: Any) -> None:
    with building(config):
        assert configuration() is config
    assert configuration() is None
    with pytest.raises(ValueError, match="needs --plugin stateful"):
        SessionFiles(None, memoryview(b""), "SessionFiles", "nowhere")


def test_the_folder_is_closed_to_others_even_where_it_was_open(tmp_path: Path) -> None:
    facts = {"model": "tiny"}
    (tmp_path / digest_of(facts)).mkdir(mode=0o755)
    folder = prepared(tmp_path, facts)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert prepared(tmp_path, facts) == folder
    assert [path.name for path in folder.iterdir()] == [FACTS_FILE]


def test_the_files_of_another_size_of_blocks_are_left_alone(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie beside the server's own, and a running server may use them."""

    def stock(self: Any, *_: Any, root_dir: str, **__: Any) -> None:
        self.file_mapper = SimpleNamespace(base_path=f"{root_dir}/model_16", rank=0)

    monkeypatch.setattr(FileSystemTierManager, "__init__", stock)
    monkeypatch.setattr(FileSystemTierManager, "block_size_bytes", 64)
    folder = prepared(tmp_path, kv_facts(config))
    for name in ("model_16_r0/short.bin", "model_32_r0/other.bin"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(bytes(32))
    with building(config):
        SessionFiles(None, memoryview(b""), "SessionFiles", str(tmp_path))
    for thread in threading.enumerate():
        if thread.name == "session-files":
            thread.join()
    assert [path.name for path in folder.rglob("*.bin")] == ["other.bin"]


def test_files_that_are_not_whole_are_removed(tmp_path: Path) -> None:
    now_s, below = 1e6, tmp_path / "abc" / "de_g0"
    below.mkdir(parents=True)
    sizes = {"whole.bin": 64, "short.bin": 63, "long.bin": 65, "empty.bin": 0, FACTS_FILE: 3}
    parts = {"killed.bin_1.tmp": now_s - PART_S - 1, "written.bin_2.tmp": now_s}
    for name, size in {**sizes, **dict.fromkeys(parts, 10)}.items():
        (below / name).write_bytes(bytes(size))
    for name, time_s in parts.items():
        os.utime(below / name, (time_s, time_s))
    assert remove_broken(tmp_path, 64, now_s) == (4, 1)
    left = {path.name for path in below.iterdir()}
    assert left == {"whole.bin", FACTS_FILE, "written.bin_2.tmp"}
    assert remove_broken(tmp_path, 64, now_s) == (0, 1)
