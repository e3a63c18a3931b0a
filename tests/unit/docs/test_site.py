# SPDX-License-Identifier: Apache-2.0
"""The documentation builds as a site, every link in it leads somewhere, and it loads nothing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("details/*.md"))
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
    *BENCHMARKS,
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


class _Loaded(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        key = {"link": "href", "script": "src", "img": "src", "iframe": "src"}.get(tag)
        found = dict(attrs).get(key or "")
        self.urls += [found] if found else []


def test_every_page_is_in_the_site(site: Path) -> None:
    """Strict, the build says which pages the navigation lacks, and which links are broken."""
    for page in PAGES:
        relative = page.relative_to(ROOT).with_suffix(".html")
        if page.name == "README.md":
            relative = relative.with_name("index.html")
        assert (site / relative).exists(), relative
    assert (site / "index.html").exists()


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        reader = _Loaded()
        reader.feed(page.read_text())
        assert reader.urls
        for url in reader.urls:
            assert not re.match(r"(\w+:)?//", url), f"{page.name}: {url}"


def test_an_anchor_is_that_of_github(site: Path) -> None:
    """One link then works in both places."""
    text = (site / "docs" / "diagnostics.html").read_text()
    assert 'id="openai-prompt_cache_diagnostics"' in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_reads_the_same_on_github(page: Path) -> None:
    """A list inside a list is indented by four spaces: with two it is flat in the site."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    assert text.startswith("# ")
    assert not re.findall(r"^ {1,3}(?:[-*]|\d+\.) .*", text, flags=re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_programs_in_a_page_can_be_parsed(page: Path) -> None:
    for program in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S):
        ast.parse(program)
