# SPDX-License-Identifier: Apache-2.0
"""`GET /stateful` in a browser, over a server whose agents resume, fork, change and lose histories.

The picture of the operator's page is docs/page.png: `STATEFUL_PAGE=docs/page.png` writes it anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from browser import Browser, Element
from live_server import LiveServer
from local_models import ROOT, SMOLLM2
from PIL import Image
from play import offloading

pytestmark = pytest.mark.e2e

ADMIN, ALICE, BOB = "the-operators-key", "tenant-alice", "tenant-bob"
PLANTED = "<img src=x onerror=alert(1)>"
BOBS = "bobs-own-session"

ROLES = {
    "refactor-parser": "You are a careful programmer. You read files before you change them. ",
    "travel-planner": "You plan journeys for two people who like old towns and short walks. ",
    "quarterly-report": "You analyse tables of sales and write what changed, in plain words. ",
    "support-desk": "You answer customers of a shop. You are polite and look up their orders. ",
}
QUESTIONS = (
    "Where do we begin?",
    "Please look at it more closely, then.",
    "What would you change first, and why?",
    "Is there anything else?",
)


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"path": {"type": "string", "maxLength": 8}}}
    described = {"name": name, "description": f"Runs {name}.", "parameters": parameters}
    return {"type": "function", "function": described}


TOOLS = [tool("read_file"), tool("run_tests")]


class Agent:
    """One conversation: each turn sends back what was said before."""

    def __init__(self, url: str, session: str, system: str, key: str = ALICE) -> None:
        self.url, self.session, self.key = url, session, key
        self.history: list[dict[str, Any]] = [{"role": "system", "content": system}]

    def asks(self, question: str, **options: Any) -> None:
        """One turn, whose answer becomes part of the history."""
        self.history.append({"role": "user", "content": question})
        body = {"model": "smollm2", "messages": self.history, "temperature": 0, **options}
        headers = {"Authorization": f"Bearer {self.key}", "X-Session-ID": self.session}
        path = f"{self.url}/v1/chat/completions"
        answer = httpx.post(path, json={"max_tokens": 8, **body}, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        message = answer.json()["choices"][0]["message"]
        self.history.append({"role": "assistant", "content": message["content"] or ""})

    def calls(self, name: str) -> None:
        """One turn that calls a tool."""
        choice = {"type": "function", "function": {"name": name}}
        self.asks("Call the tool.", tools=TOOLS, tool_choice=choice, max_tokens=40)

    def child(self, session: str) -> Agent:
        made = Agent(self.url, session, "", self.key)
        made.history = [*self.history]
        return made


def play(url: str) -> None:
    """Six sessions of Alice and one of Bob, whose turns find their context in different ways."""
    parser, travel, report, desk = (
        Agent(url, name, role * (5 + 3 * place)) for place, (name, role) in enumerate(ROLES.items())
    )
    for question in QUESTIONS[:3]:
        parser.asks(question)
        travel.asks(question)
    tests = parser.child("refactor-parser/tests")
    tests.asks("You write the tests.")
    tests.asks(QUESTIONS[3])
    docs = parser.child("refactor-parser/docs")
    docs.asks("You write the documentation.")
    report.asks(QUESTIONS[0])
    report.history[0]["content"] = "Today is Tuesday. " + report.history[0]["content"]
    report.asks(QUESTIONS[1])
    Agent(url, BOBS, ROLES["support-desk"] * 16, BOB).asks(QUESTIONS[0])
    desk.asks(QUESTIONS[0])
    desk.asks(QUESTIONS[1], prompt_logprobs=1)
    travel.history[3]["content"] = "Only by train, please."
    travel.asks(QUESTIONS[3])
    report.asks(QUESTIONS[2])
    parser.asks(QUESTIONS[3])
    docs.asks(QUESTIONS[2])
    desk.asks(QUESTIONS[2])
    parser.calls("read_file")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return Browser(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("no `promtool` on this machine")
    return found


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    if not (SMOLLM2 / "config.json").exists():
        pytest.skip("smollm2-135m is not built: run `make model`")
    log = tmp_path_factory.mktemp("shown") / "server.log"
    options = ["--plugin", "stateful", "--stateful-check-invariants", "--block-size", "32"]
    options += ["--served-model-name", "smollm2", "--max-model-len", "1024"]
    options += ["--num-gpu-blocks-override", "56", "--stateful-pin-fraction", "0.9"]
    options += ["--stateful-admin-key", ADMIN]
    options += ["--chat-template", str(ROOT / "benchmarks" / "models" / "smollm2_tools.jinja")]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    options += ["--kv-transfer-config", json.dumps(offloading(64 * 1024**2))]
    options += ["--api-key", ADMIN, ALICE, BOB]
    helpers = {"PYTHONPATH": str(Path(__file__).parent)}
    with LiveServer(SMOLLM2, log, *options, environment=helpers) as server:
        play(server.url)
        yield server
        assert server.process.poll() is None, server.last_words()


def page_of(live: LiveServer, key: str) -> str:
    return f"{live.url}/stateful#key={quote(key)}"


def names(page: Element) -> list[str]:
    """The sessions of the table, parents before their children."""
    return [cell.text.removeprefix("↳ ") for cell in page.one("sessions").all("td", "name")]


def test_a_client_sees_its_sessions_and_why_its_turns_computed(
    browser: Browser, live: LiveServer
) -> None:
    page = browser.dump(page_of(live, ALICE))
    listed = names(page)
    assert {*ROLES} <= {*listed}
    place = listed.index("refactor-parser")
    assert {*listed[place + 1 : place + 3]} == {"refactor-parser/tests", "refactor-parser/docs"}
    reasons = page.one("turns").text
    for words in ("The first turn of its session.", "The history changed at token"):
        assert words in reasons
    assert "Stock vLLM served it: it asks for log-probabilities of its prompt." in reasons
    assert "waits for read_file" in page.one("sessions").text
    headers = {"Authorization": f"Bearer {ALICE}"}
    turns = httpx.get(f"{live.url}/v1/turns", headers=headers).json()["turns"]
    rows = page.one("turns").all("div", "turn")
    assert len(rows) == len(turns)
    for row, turn in zip(rows, turns, strict=True):
        (why,) = row.all("div", "why")
        assert why.text == " ".join(turn["explanation"][1:-1])
        for name in ("reused", "loaded", "computed"):
            assert len(row.all("i", name)) == (turn[f"{name}_tokens"] > 0)
    assert page.one("status").text.startswith("As of ")


def test_nothing_of_anothers_is_on_the_page(browser: Browser, live: LiveServer) -> None:
    page = browser.dump(page_of(live, ALICE))
    assert BOBS not in page.text
    assert "your sessions hold" in page.one("pool-sum").text
    assert not page.one("pool-bar").all("i", "free")
    page = browser.dump(page_of(live, BOB))
    assert names(page) == [BOBS]
    assert "refactor-parser" not in page.text


def test_the_operator_sees_all_and_the_pool(browser: Browser, live: LiveServer) -> None:
    page = browser.dump(page_of(live, ADMIN))
    assert {BOBS, "refactor-parser"} <= {*names(page)}
    assert page.one("pool-sum").text.startswith("55 in all: waiting sessions keep ")
    assert page.one("pool-bar").all("i", "free")


def test_the_page_asks_nobody_but_its_server(browser: Browser, live: LiveServer) -> None:
    browser.dump(page_of(live, ALICE))
    assert browser.hosts() == {"127.0.0.1"}


@pytest.mark.parametrize("fragment", ["", "#key=wrong"])
def test_without_a_key_the_page_holds_nothing_and_says_why(
    browser: Browser, live: LiveServer, fragment: str
) -> None:
    page = browser.dump(f"{live.url}/stateful{fragment}")
    said = page.one("status").text
    assert said.startswith("The server answers 401 to /v1/")
    assert said.endswith(": Unauthorized")
    assert not names(page)
    assert not page.one("turns").inside


@pytest.mark.parametrize("key", [None, "wrong"])
def test_without_a_key_no_route_holds_anything(live: LiveServer, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    ids = {"session_id": BOBS, "request_id": BOBS}
    for path, methods in httpx.get(f"{live.url}/openapi.json").json()["paths"].items():
        for method, described in methods.items():
            if "sessions" in described.get("tags", []):
                asked = live.url + path.format(**ids)
                answer = httpx.request(method, asked, headers=headers)
                assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
                assert BOBS not in str(answer.headers)


@contextmanager
def running(url: str) -> Iterator[None]:
    """While a turn runs. It is aborted."""
    messages = [{"role": "system", "content": ROLES["refactor-parser"] * 3}]
    messages += [{"role": "user", "content": QUESTIONS[2]}]
    body = {"model": "smollm2", "messages": messages, "stream": True, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {ALICE}", "X-Session-ID": "nightly-review"}
    path = f"{url}/v1/chat/completions"
    with httpx.stream("POST", path, json=body, headers=headers, timeout=120) as answer:
        lines = answer.iter_lines()  # kept, for without it the answer is closed
        assert next(lines).startswith("data: ")
        yield


def test_a_turn_that_runs_is_seen(browser: Browser, live: LiveServer, tmp_path: Path) -> None:
    """And a picture is taken of it."""
    kept = os.environ.get("STATEFUL_PAGE")
    path = Path(kept).resolve() if kept else tmp_path / "page.png"
    with running(live.url):
        browser.picture(page_of(live, ADMIN), path, 1280, 1330)
        page = browser.dump(page_of(live, ADMIN), seconds=1)
    (state,) = page.one("sessions").all("span", "on")
    assert state.text == "running"
    assert page.one("pool-bar").all("i", "running")
    Image.open(path).quantize(64).save(path, optimize=True)
    assert 20_000 < path.stat().st_size < 200_000


def test_text_of_a_client_is_shown_as_text(browser: Browser, live: LiveServer) -> None:
    Agent(live.url, PLANTED, ROLES["support-desk"], ALICE).asks("<script>alert(2)</script>")
    page = browser.dump(page_of(live, ALICE))
    assert PLANTED in names(page)
    assert not page.all("img")
    assert len(page.all("script")) == 1


def test_prometheus_has_nothing_to_say_about_our_metrics(promtool: str, live: LiveServer) -> None:
    told = httpx.get(f"{live.url}/metrics").text
    assert "vllm_stateful_turns_total{" in told
    command = [promtool, "check", "metrics"]
    done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=60)
    complaints = (done.stdout + done.stderr).splitlines()
    assert not [line for line in complaints if "vllm_stateful_" in line]
    assert not [line for line in complaints if line.startswith("error")], complaints
