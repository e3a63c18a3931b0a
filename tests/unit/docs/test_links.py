# SPDX-License-Identifier: Apache-2.0
"""What pages and sources say of the benchmarks' pages, commands and anchors exists."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "README.md"
DETAILS = sorted((BENCHMARKS / "details").glob("*.md"))
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "csrc").glob("*.md"),
        *(ROOT / "patches").glob("*.md"),
        RESULTS,
        *DETAILS,
    ]
)
SOURCES = sorted(
    path
    for folder in ("vllm_stateful", "benchmarks", "csrc", "tests", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".sh", ".cpp", ".cu", ".cuh", ".h", ".hpp"}
)
MOST_LINES = 180
"""Of the page of results: it is read in two minutes."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def prose(path: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.M | re.S)


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*?)$", prose(path), flags=re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        same = sum(each == anchor for each in found)
        found.append(f"{anchor}-{same}" if same else anchor)
    return frozenset(found)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_link_leads_to_a_file_and_its_anchor(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_sources_name_pages_of_benchmarks_that_exist() -> None:
    named = {
        (name_of(path), page)
        for path in SOURCES
        for page in re.findall(r"\bbenchmarks/[\w/-]+\.md\b", path.read_text())
    }
    assert named
    assert not [each for each in named if not (ROOT / each[1]).exists()]


@pytest.mark.parametrize("path", [RESULTS, *DETAILS], ids=name_of)
def test_commands_of_a_page_exist(path: Path) -> None:
    text = path.read_text()
    modules = set(re.findall(r"python -m (benchmarks[\w.]*\w)", text))
    if path == RESULTS:  # commands stand there without "python -m benchmarks."
        names = re.findall(r"`((?:\w+\.)?\w+)(?: --[^`]*)?` \| (?:\[|\|)", text)
        modules |= {f"benchmarks.{name}" for name in names}
        assert len(modules) > 10
    for module in modules:
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module


def test_the_page_of_results_is_short_and_leads_to_all_details() -> None:
    text = RESULTS.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert DETAILS
    for page in DETAILS:
        assert f"(details/{page.name}" in text
