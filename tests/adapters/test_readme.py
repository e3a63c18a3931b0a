# SPDX-License-Identifier: Apache-2.0
"""What README.md, docs/ and benchmarks/ say of the code is what the code has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

import vllm_stateful
from vllm_stateful.adapters.frontend.command_line import options_help
from vllm_stateful.config import ENABLE_ENV, FEATURES, OPTIONS
from vllm_stateful.observe.metrics import METRICS, Metric
from vllm_stateful.request.session_identity import Source
from vllm_stateful.session.turn_record import Cause
from vllm_stateful.types import Demotion, Outcome

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (
    ROOT / "README.md",
    *sorted(DOCS.rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "benchmarks" / "details").glob("*.md")),
)
MOST_README_LINES = 120
"""Two screens."""


def page(name: str) -> str:
    return (DOCS / name).read_text()


def series(metric: Metric) -> str:
    """The name of a metric in ``/metrics``."""
    return metric.name + ("_total" if metric.kind == "counter" else "")


def first_column(text: str, heading: str) -> list[str]:
    """The names in the first column of the table below a heading."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_options_page_shows_the_help_text_of_every_option() -> None:
    (shown, *_) = re.findall(r"^```\n(.*?)^```", page("options.md"), flags=re.M | re.S)
    assert shown == options_help() + "\n"


def test_the_options_page_has_every_stage_that_can_be_left_to_stock_vllm() -> None:
    named = first_column(page("options.md"), "Stages that can be left to stock vLLM")
    assert tuple(named) == FEATURES


def test_the_metrics_page_has_every_metric_with_its_label() -> None:
    rows = re.findall(r"^\| `(vllm_\w+)` \| (?:`(\w+)` )?\|", page("metrics.md"), flags=re.M)
    assert sorted((name, label or None) for name, label in rows) == sorted(
        (series(metric), metric.label) for metric in METRICS
    )


@pytest.mark.parametrize("values", [Outcome, Demotion])
def test_the_metrics_page_explains_the_values_of_a_label(values: type[Outcome | Demotion]) -> None:
    for value in values:
        assert f"`{value}`" in page("metrics.md")


def test_the_page_of_clients_has_every_source_of_a_session_id_in_order() -> None:
    named = first_column(page("clients/index.md"), "How a session is named")
    last = "previous-response-id"  # `ResponseChain` is asked where nothing else names a session
    sources = [source for source in get_args(Source) if source not in ("none", last)]
    assert named == [*sources, last]


def test_the_page_that_explains_turns_has_every_cause() -> None:
    text = page("explain.md").split("\n## The causes\n")[1]
    for cause in Cause:
        assert f"`{cause}`" in text, cause


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_page_names_only_what_exists(path: Path) -> None:
    """Options, environment variables and metrics; `--stateful-*` stands for all options."""
    text = path.read_text()
    flags = {option.flag for option in OPTIONS}
    assert set(re.findall(r"--stateful-[a-z-]*[a-z]", text)) - {"--stateful-"} <= flags
    variables = {ENABLE_ENV, *(option.env for option in OPTIONS)}
    assert set(re.findall(r"VLLM_STATEFUL\w*", text)) <= variables
    metrics = {series(metric) for metric in METRICS} | {"vllm_stateful_"}
    in_metrics = set(re.findall(r"\bvllm_stateful_\w*", text))
    assert in_metrics <= metrics | {metric.name for metric in METRICS}


def test_the_tuning_page_shortens_the_names_of_metrics_that_exist() -> None:
    known = {(series(metric).removeprefix("vllm_stateful_"), metric.label) for metric in METRICS}
    named = re.findall(r"`(\w+_total)\{(\w+)", page("tuning.md"))
    assert len(named) >= 8
    assert set(named) <= known


def test_the_readme_is_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_README_LINES


def test_the_walk_names_functions_that_exist() -> None:
    """Each row of docs/one-turn.md: a file, and a function or method in it."""
    package = Path(vllm_stateful.__file__).parent
    named = re.findall(r"`((?:\w+/)+\w+\.py)` `([\w.]+)`", page("one-turn.md"))
    assert len(named) >= 9
    for file, name in named:
        source = (package / file).read_text()
        for part in name.split("."):
            assert re.search(rf"\b(def|class) {part}\b", source), f"{file}: {name}"
