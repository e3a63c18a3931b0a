# SPDX-License-Identifier: Apache-2.0
"""``vllm-stateful doctor`` and vLLM itself: what it says of models, settings and mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from forked import with_vllm

from benchmarks.models import shapes
from vllm_stateful.adapters import doctor

PROGRAM = Path(doctor.__file__).with_name("__main__.py")
TINY = Path(__file__).parents[2] / ".cache" / "models" / "tiny-llama"
IDS = "--skip-tokenizer-init"
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
Examine = Callable[..., dict[str, dict[str, Any]]]


def connector(name: str, role: str = "kv_both", **extra: Any) -> list[str]:
    config = {"kv_connector": name, "kv_role": role, "kv_connector_extra_config": extra}
    return ["--kv-transfer-config", json.dumps(config)]


OFFLOADING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 28},
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}

CASES: dict[str, tuple[str, list[str], str, str]] = {
    "full": ("llama", [], "ok", "kept; KV cache groups: 1 full; blocks of 128 tokens"),
    "windows": ("gemma3", [], "ok", "kept; KV cache groups: 2 window, 1 full;"),
    "harmony": ("gptoss", [], "ok", "kept; KV cache groups: 1 window, 1 full;"),
    "chunks": ("llama4", [], "ok", "kept; KV cache groups: 3 window, 1 full;"),
    "states": ("qwen3next", ["--enable-prefix-caching"], "ok", "groups: 3 state, 1 full;"),
    "mamba": ("mamba2", ["--enable-prefix-caching"], "ok", "kept; KV cache groups: 1 state;"),
    "mamba by default": ("mamba2", [], "off", "--enable-prefix-caching turns it on"),
    "no prefix caching": (
        "llama",
        ["--no-enable-prefix-caching", "--stateful-strict"],
        "off",
        "not kept: prefix caching is off (--no-enable-prefix-caching); KV cache groups: 1 full",
    ),
    "a connector": (
        "llama",
        connector("NixlConnector", "kv_producer"),
        "off",
        "as kv_producer: P/D transfer, blocks belong to another engine",
    ),
    "an unknown connector": ("llama", connector("NoSuch"), "refused", "NoSuch"),
    "tiers": ("gemma3", connector("MultiConnector", connectors=[OFFLOADING]), "ok", "kept;"),
    "two devices": (
        "llama",
        ["--tensor-parallel-size", "2"],
        "ok",
        "kept; KV cache groups: 1 full",
    ),
    "not on a CPU": (
        "deepseek_v32",
        [],
        "warn",
        "not known before the start: NotImplementedError: Sparse Attention is not supported on CPU",
    ),
    "a bad value": (
        "llama",
        ["--stateful-pin-fraction", "2"],
        "refused",
        "--stateful-pin-fraction='2': must be a number from 0 to 1",
    ),
    "no such option": ("llama", ["--stateful-magic", "1"], "refused", "--stateful-magic"),
    "what vLLM refuses": ("llama", ["--max-model-len", "99999999"], "refused", "max_model_len"),
    "an unknown plugin": ("llama", ["--plugin", "nosuch"], "off", "no such plugin"),
}


def examine(folder: Path, *words: object, **environment: str) -> dict[str, dict[str, Any]]:
    """The findings by section; ``refused`` where vLLM refuses."""
    out = folder / "findings"
    with_vllm().run(PROGRAM, out, *words, **OFFLINE, **environment)
    made = [json.loads(line) for line in out.read_text().splitlines()]
    return {each.get("section", "refused"): each for each in made}


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """The findings of all cases, by case."""
    folders = tmp_path_factory.mktemp("doctor")

    def run(name: str) -> dict[str, dict[str, Any]]:
        family, words, _, _ = CASES[name]
        folder = folders / name.replace(" ", "-")
        folder.mkdir()
        shapes.write(family, folder)
        return examine(folder, folder, IDS, *words)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(run, CASES), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_of_a_command_line(
    examined: dict[str, dict[str, dict[str, Any]]], case: str
) -> None:
    _, _, mark, text = CASES[case]
    found = examined[case]
    if mark == "refused":
        assert text in found["refused"]["refused"]
        assert "\n" not in found["refused"]["refused"]
        return
    section = "plugin" if case == "an unknown plugin" else "sessions"
    assert found[section]["mark"] == mark, found
    assert text in found[section]["text"]


def test_options_are_those_that_the_server_would_have(tmp_path: Path) -> None:
    found = examine(
        tmp_path,
        *("--stateful-tenant", "cache-salt", "--stateful-strict"),
        VLLM_STATEFUL_PIN_FRACTION="0.3",
    )
    options = found["options"]
    assert "pin_fraction 0.3 (VLLM_STATEFUL_PIN_FRACTION)" in options["text"]
    assert "tenant cache-salt (--stateful-tenant)" in options["text"]
    facts = options["facts"]
    assert (facts["pin_fraction"], facts["tenant"], facts["strict"]) == (0.3, "cache-salt", True)
    assert "sessions" not in found


def test_a_key_is_not_shown(tmp_path: Path) -> None:
    for words, environment in (
        (("--stateful-admin-key", "planted-key"), {}),
        ((), {"VLLM_STATEFUL_ADMIN_KEY": "planted-key"}),
    ):
        found = examine(tmp_path, *words, **environment)
        assert "planted" not in json.dumps(found)
        assert found["options"]["facts"]["admin_key"] is True
        (tmp_path / "findings").unlink()


def test_of_a_model_that_takes_text_the_stages_are_told(tmp_path: Path) -> None:
    if not TINY.exists():
        pytest.skip("tiny-llama is not built: run `make model`")
    template = tmp_path / "looks_ahead.jinja"
    template.write_text("{% for m in messages %}{{ loop.last }}{{ m['content'] }}{% endfor %}")
    found = examine(tmp_path, TINY, "--dtype", "float32")
    assert {found[name]["mark"] for name in ("sessions", "template", "tokenizer")} == {"ok"}
    assert found["drafts"]["text"] == "from sessions, by the engine core"
    (tmp_path / "findings").unlink()
    found = examine(
        *(tmp_path, TINY, "--dtype", "float32", "--chat-template", template),
        *("--stateful-disable", "tokenize", "--speculative-config", json.dumps(NGRAM)),
    )
    assert "does not write each message on its own" in found["template"]["text"]
    assert "disabled (--stateful-disable tokenize)" in found["tokenizer"]["text"]
    assert "ngram" in found["drafts"]["text"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    found = examine(tmp_path, tmp_path / "nothing")
    assert "there is no such folder" in found["refused"]["refused"]
