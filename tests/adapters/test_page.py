# SPDX-License-Identifier: Apache-2.0
"""`GET /stateful`: what the page may do in a browser. It is seen in tests/e2e/test_page.py."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import vllm_stateful
from vllm_stateful.adapters.frontend import endpoint
from vllm_stateful.adapters.frontend.page import page_text

SCRIPT = re.findall(r"<script>(.*?)</script>", page_text(), re.DOTALL)[0]


def client(monkeypatch: pytest.MonkeyPatch, *, is_on: bool = True) -> TestClient:
    monkeypatch.setattr(endpoint, "_is_on", lambda: is_on)
    app = FastAPI()
    endpoint.StatefulEndpoint().attach_router(app)
    return TestClient(app)


def test_the_page_is_served_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client(monkeypatch).get("/stateful")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == page_text()
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_there_is_no_page_where_the_plugin_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert client(monkeypatch, is_on=False).get("/stateful").status_code == 404


def test_a_browser_runs_nothing_but_the_pages_own_script(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = client(monkeypatch).get("/stateful").headers["content-security-policy"]
    policy = dict(part.split(" ", 1) for part in sent.split("; "))
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == f"'sha256-{digest}'"
    assert re.fullmatch(r"'sha256-\S+'", policy["style-src"])
    assert policy["connect-src"] == "'self'"
    assert policy["img-src"] == "data:"
    assert len(policy) == 8


@pytest.mark.parametrize(
    "word",
    [
        *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "setHTML", "srcdoc"),
        *("createContextualFragment", "DOMParser", "eval(", "Function("),
        *("localStorage", "cookie", "indexedDB"),
    ],
)
def test_text_of_clients_never_becomes_markup_and_keys_stay_in_the_tab(word: str) -> None:
    assert word not in SCRIPT


def test_the_page_names_no_other_server() -> None:
    assert not re.findall(r"\w+:?//(?! )\S+", page_text())
    assert not re.search(r"@import|url\(", page_text())


class Handlers(HTMLParser):
    """Attributes that the policy would have to allow."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [name for name, _ in attrs if name.startswith("on") or name == "style"]


def test_nothing_is_inline_but_one_script_and_one_style() -> None:
    handlers = Handlers()
    handlers.feed(page_text())
    assert not handlers.found
    assert page_text().count("<script") == page_text().count("<style") == 1


def test_the_page_is_in_the_package() -> None:
    """`wheel.packages` takes whole folders; nothing may exclude the page from them."""
    root = Path(vllm_stateful.__file__).parents[1]
    assert (root / "vllm_stateful" / "adapters" / "frontend" / "page.html").is_file()
    ignored = (root / ".gitignore").read_text().split()
    assert not {line for line in ignored if line.endswith("html")}
    assert "wheel.exclude" not in (root / "pyproject.toml").read_text()
