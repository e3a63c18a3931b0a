# SPDX-License-Identifier: Apache-2.0
"""Debian's Chromium without a window: what a page becomes, what it looks like, whom it asked."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-default-apps", "--disable-extensions", "--disable-domain-reliability"),
    *("--no-pings", "--hide-scrollbars", "--disable-lcd-text"),
    "--disable-features=AutofillServerCommunication",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # what it asks for itself, too
)
VOID = {"input", "link", "meta", "img", "br"}


class Element:
    """One element of a page that was dumped."""

    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes = tag, attributes
        self.inside: list[Element | str] = []

    @property
    def text(self) -> str:
        """All text in it."""
        parts = [part if isinstance(part, str) else part.text for part in self.inside]
        return "".join(parts)

    def all(self, tag: str = "", classes: str = "", name: str = "") -> list[Element]:
        """The elements in it with this tag, with this class, with this id."""
        found = []
        for part in self.inside:
            if isinstance(part, str):
                continue
            fits = not tag or part.tag == tag
            fits &= not classes or classes in (part.attributes.get("class") or "").split()
            fits &= not name or part.attributes.get("id") == name
            found += [part] if fits else []
            found += part.all(tag, classes, name)
        return found

    def one(self, name: str) -> Element:
        """The element with this id."""
        (found,) = self.all(name=name)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        made = Element(tag, dict(attrs))
        self.open[-1].inside.append(made)
        if tag not in VOID:
            self.open.append(made)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


class Browser:
    """Chromium with a profile of its own for each page. Skips the test where there is none.

    Args:
        folder: for profiles, pictures and logs.
    """

    def __init__(self, folder: Path) -> None:
        found = shutil.which("chromium")
        if found is None:
            pytest.skip("no `chromium` on this machine")
        self._program, self._folder, self._pages = found, folder, 0

    def dump(self, url: str, *, seconds: int = 5) -> Element:
        """The page after so many seconds of its clock."""
        done = self._run(url, f"--virtual-time-budget={1000 * seconds}", "--dump-dom")
        reader = _Reader()
        reader.feed(done.stdout)
        return reader.open[0]

    def picture(self, url: str, path: Path, width: int, height: int, *flags: str) -> None:
        """Write a PNG of the page."""
        size = f"--window-size={width},{height}"
        budget = "--virtual-time-budget=5000"
        self._run(url, f"--screenshot={path}", size, budget, *flags)

    def hosts(self) -> set[str]:
        """The hosts that the last page, or the browser for its sake, asked."""
        log = json.loads((self._profile / "net.json").read_text())
        started = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
        begun = [event.get("params", {}) for event in log["events"] if event["type"] == started]
        ours = [each for each in begun if "127.0.0.1" in each.get("network_isolation_key", "")]
        assert ours
        return {urlsplit(each["url"]).hostname or "" for each in ours}

    @property
    def _profile(self) -> Path:
        return self._folder / f"profile-{self._pages}"

    def _run(self, url: str, *flags: str) -> subprocess.CompletedProcess[str]:
        self._pages += 1
        profile = (f"--user-data-dir={self._profile}", f"--log-net-log={self._profile}/net.json")
        self._profile.mkdir()
        return subprocess.run(
            [self._program, *FLAGS, *profile, *flags, url],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
