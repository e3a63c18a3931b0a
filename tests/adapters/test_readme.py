# SPDX-License-Identifier: Apache-2.0
"""What README.md and docs/ say of the code is what the code has."""

import re
from pathlib import Path

import vllm_stateful
from vllm_stateful.adapters.frontend.command_line import options_help
from vllm_stateful.observe.metrics import METRICS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_readme_shows_the_help_text_of_every_option() -> None:
    assert options_help() in README


def test_the_readme_names_every_metric() -> None:
    for metric in METRICS:
        suffix = metric.name.removeprefix("vllm_stateful_prompt_tokens")
        assert metric.name in README or f"...{suffix}" in README, metric.name


def test_the_walk_names_functions_that_exist() -> None:
    """Each row of docs/one-turn.md: a file, and a function or method in it."""
    package = Path(vllm_stateful.__file__).parent
    text = (ROOT / "docs" / "one-turn.md").read_text()
    named = re.findall(r"`((?:\w+/)+\w+\.py)` `([\w.]+)`", text)
    assert len(named) >= 9
    for file, name in named:
        source = (package / file).read_text()
        for part in name.split("."):
            assert re.search(rf"\b(def|class) {part}\b", source), f"{file}: {name}"
