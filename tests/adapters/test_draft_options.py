# SPDX-License-Identifier: Apache-2.0
"""Which ``--speculative-config`` the plugin makes of ``--stateful-drafts`` and the model."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from serve_parser import Parse, make_parser
from vllm.platforms.interface import CpuArchEnum
from vllm.utils.argparse_utils import FlexibleArgumentParser

from benchmarks.models import shapes
from vllm_stateful.adapters.frontend import draft_options
from vllm_stateful.adapters.speculation import (
    CUSTOM_PROCESSORS,
    IN_ENGINE_CORE,
    ON_DEVICE,
    why_no_drafts,
)
from vllm_stateful.config import process_config

pytestmark = pytest.mark.usefixtures("fresh_process")

PLUGIN = ("--plugin", "stateful")
DRAFTING = [
    ["--plugin", "stateful", "--stateful-drafts", "on"],
    ["--stateful-drafts", "on", "--plugin", "stateful"],
    ["--plugin", "stateful", "--stateful-profile", "fast"],
    ["--stateful-profile", "fast", "--plugin", "stateful"],
]
HEAD = '{"method": "mtp", "num_speculative_tokens": 1}'


@pytest.mark.parametrize("words", DRAFTING, ids=" ".join)
def test_drafts_on_makes_the_right_speculative_config(parse: Parse, words: list[str]) -> None:
    assert parse(*words).speculative_config == IN_ENGINE_CORE


@pytest.mark.parametrize("words", DRAFTING, ids=" ".join)
def test_on_cuda_the_device_drafts(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(draft_options.current_platform, "is_cuda", lambda: True, raising=False)
    assert parse(*words).speculative_config == ON_DEVICE


@pytest.mark.parametrize("words", DRAFTING, ids=" ".join)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_config_of_the_users_own_wins(parse: Parse, words: list[str], is_first: bool) -> None:
    own = ["--speculative-config", HEAD]
    arguments = parse(*(own + words if is_first else words + own))
    assert arguments.speculative_config["method"] == "mtp"


def test_drafts_on_in_the_environment_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STATEFUL", "1")
    monkeypatch.setenv("VLLM_STATEFUL_PROFILE", "fast")
    process_config.cache_clear()
    assert make_parser().parse_args(["some/model"]).speculative_config == IN_ENGINE_CORE


@pytest.mark.parametrize("words", DRAFTING, ids=" ".join)
@pytest.mark.parametrize("is_first", [True, False])
def test_short_options_for_a_head_win_too(parse: Parse, words: list[str], is_first: bool) -> None:
    own = ["--spec-method", "eagle3", "--spec-model", "some/head", "--spec-tokens", "4"]
    arguments = parse(*(own + words if is_first else words + own))
    assert arguments.speculative_config is None
    assert (arguments.spec_method, arguments.spec_tokens) == ("eagle3", 4)


# ---- auto ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a config.json: families in small, and some of another kind."""
    folders = tmp_path_factory.mktemp("models")
    for name in ("llama", "gemma3", "deepseek", "qwen3next", "mamba2"):
        folder = folders / name
        folder.mkdir()
        shapes.write(name, folder)
    llama = json.loads((folders / "llama" / "config.json").read_text())
    others: dict[str, dict[str, Any]] = {
        "pooling": llama | {"architectures": ["LlamaForSequenceClassification"]},
        "whisper": {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "d_model": 64,
            "max_target_positions": 448,
        },
        "speculators": {
            "architectures": ["Eagle3Speculator"],
            "model_type": "speculators",
            "speculators_model_type": "eagle3",
            "speculators_config": {
                "algorithm": "eagle3",
                "proposal_methods": [{"speculative_tokens": 3}],
                "verifier": {"name_or_path": "some/verifier"},
            },
            "transformer_layer_config": llama,
        },
    }
    for name, config in others.items():
        (folders / name).mkdir()
        (folders / name / "config.json").write_text(json.dumps(config))
    return folders


WATERMARK = '{"key": 1}'
ENFORCER = '{"backend": "lm-format-enforcer"}'
AUTO: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "attention": ("llama", (), None),
    "windows": ("gemma3", (), None),
    "latent attention": ("deepseek", (), None),
    "auto is given": ("llama", ("--stateful-drafts", "auto"), None),
    "exact": ("llama", ("--stateful-profile", "exact"), None),
    "linear attention": ("qwen3next", (), "a recurrent state of its own"),
    "mamba": ("mamba2", (), "a recurrent state of its own"),
    "pooling": ("pooling", (), "generates no text"),
    "an encoder": ("whisper", (), "an encoder of its own"),
    "a head comes along": ("speculators", (), "brings a drafting head along"),
    "no sessions": ("llama", ("--no-enable-prefix-caching",), "without prefix caching"),
    "async": ("llama", ("--async-scheduling",), "without --async-scheduling"),
    "lora": ("llama", ("--enable-lora",), "with LoRA"),
    "watermark": ("llama", ("--watermark-config", WATERMARK), "watermarks only"),
    "grammars": ("llama", ("--structured-outputs-config", ENFORCER), "lm-format-enforcer"),
    "embeddings": ("llama", ("--enable-prompt-embeds",), "may be embeddings"),
    "stages": ("llama", ("--pipeline-parallel-size", "2"), "pipeline parallelism"),
    "processors": ("llama", ("--logits-processors", "a.b:C"), CUSTOM_PROCESSORS),
    "no model": ("nosuch", (), "the model was not understood"),
    "a context too long": ("llama", ("--max-model-len", "99999999"), "was not understood"),
}


@pytest.mark.parametrize("case", AUTO)
def test_auto_drafts_on_a_cpu_where_it_never_hurts(parse: Parse, models: Path, case: str) -> None:
    name, words, reason = AUTO[case]
    made = parse(*PLUGIN, *words, model=str(models / name)).speculative_config
    said = why_no_drafts(process_config())
    if reason is None:
        assert made == IN_ENGINE_CORE
        assert said == "--stateful-drafts auto: only `vllm serve` makes a --speculative-config"
    else:
        assert made is None
        assert said.startswith("--stateful-drafts auto: ")
        assert reason in said


@pytest.mark.parametrize("name", ["qwen3next", "mamba2"])
@pytest.mark.parametrize("words", DRAFTING, ids=" ".join)
def test_on_drafts_nothing_beside_states_on_a_cpu(
    parse: Parse, models: Path, words: list[str], name: str
) -> None:
    """vLLM's engine ended there with the first draft."""
    assert parse(*words, model=str(models / name)).speculative_config is None
    assert "recurrent states" in why_no_drafts(process_config())


def test_a_snapshot_is_taken_without_drafts(parse: Parse, models: Path) -> None:
    """`vllm snapshot create` has the options of `vllm serve`, and refuses to draft."""
    read = parse(*PLUGIN, "--stateful-drafts", "off", model=str(models / "llama"))
    read.snapshot_dir = "a-folder"
    process_config.cache_clear()
    os.environ["VLLM_STATEFUL_DRAFTS"] = "auto"
    draft_options.take_drafts(read)
    assert read.speculative_config is None
    assert "snapshot" in why_no_drafts(process_config())


@pytest.mark.parametrize(
    ("asked", "said"), [("is_cpu", False), ("get_cpu_architecture", CpuArchEnum.ARM)]
)
def test_auto_drafts_nothing_where_it_was_not_measured(
    parse: Parse, models: Path, monkeypatch: pytest.MonkeyPatch, asked: str, said: object
) -> None:
    monkeypatch.setattr(draft_options.current_platform, asked, lambda: said, raising=False)
    assert parse(*PLUGIN, model=str(models / "llama")).speculative_config is None
    assert why_no_drafts(process_config()).endswith("not measured on this platform yet")


@pytest.mark.parametrize(
    "words",
    [
        (*PLUGIN, "--stateful-profile", "fast", "--stateful-drafts", "off"),
        (*PLUGIN, "--stateful-drafts", "off"),
        ("--stateful-drafts", "on"),
        (),
    ],
    ids=" ".join,
)
def test_nothing_is_drafted_without_the_plugin_or_with_off(
    parse: Parse, models: Path, words: tuple[str, ...]
) -> None:
    assert parse(*words, model=str(models / "llama")).speculative_config is None


def test_a_head_that_comes_along_keeps_its_own_number_of_tokens(parse: Parse, models: Path) -> None:
    words = (*PLUGIN, "--stateful-drafts", "on")
    assert parse(*words, model=str(models / "speculators")).speculative_config is None


def test_vllm_still_logs_what_it_did_not_choose_itself(
    parse: Parse, models: Path, parser: FlexibleArgumentParser
) -> None:
    assert parse(*PLUGIN, model=str(models / "llama")).speculative_config is not None
    assert parser.parse_args([]).speculative_config is None, "vLLM's defaults, of no model"


def test_the_made_config_is_nobody_elses(parse: Parse, models: Path) -> None:
    made = parse(*PLUGIN, model=str(models / "llama")).speculative_config
    made["target_model_config"] = "vLLM writes into it"
    assert "target_model_config" not in IN_ENGINE_CORE
