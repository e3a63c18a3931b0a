# SPDX-License-Identifier: Apache-2.0
"""Two tenants, a client with a salt and an anonymous one: no answer holds anything of another's.

Each client plants ids, names and texts that have its own word in them. Then each asks all routes of
the server, for its own ids and for those of the others, and every answer is searched for the words.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from collector import ENVIRONMENT, Collector, attribute
from fastapi import FastAPI
from live_server import LiveServer
from local_models import ROOT, TINY

from vllm_stateful.adapters.frontend import endpoint
from vllm_stateful.cli.__main__ import main

pytestmark = pytest.mark.e2e

ROUTES = {
    ("GET", "/stateful"),
    ("GET", "/v1/sessions"),
    ("GET", "/v1/sessions/{session_id:path}"),
    ("GET", "/v1/sessions/{session_id:path}/turns"),
    ("DELETE", "/v1/sessions/{session_id:path}"),
    ("GET", "/v1/turns"),
    ("GET", "/v1/turns/{request_id}"),
}
"""All routes of ours. Whoever adds one must see below that it is asked for what is another's."""

PAGES = [{}, {"limit": 1}, {"limit": 1, "skip": 1}, {"limit": 200, "skip": 2}, {"limit": 0}]
UNKNOWN = "id-that-nobody-has-planted"


class Client:
    """One client, and all that it has planted.

    Args:
        name: its word is made of it.
        has_key: whether it sends an API key. One without is anonymous.
        owner: the client whose API key it has, if that is another one's. It has a salt then.
    """

    def __init__(
        self, url: str, name: str, *, has_key: bool = True, owner: Client | None = None
    ) -> None:
        self.url, self.name, self.word = url, name, f"planted{name}"
        self.key = owner.key if owner else f"{self.word}-key" if has_key else ""
        self.salt = f"{self.word}-salt" if owner else None
        self.session = f"{self.word}-session"
        self._http = httpx.Client(base_url=url, timeout=60)
        self.ids: list[str] = []
        """Those of its answers."""
        self.names: set[str] = set()
        """Hashes by which only it and the operator know its sessions."""

    @property
    def planted(self) -> set[str]:
        return {self.word, *self.ids, *self.names}

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        headers |= options.pop("headers", {})
        return self._http.request(method, path, headers=headers, **options)

    def asks(self, path: str, **parameters: Any) -> httpx.Response:
        """What is asked by ``GET``, with its salt."""
        salt = {} if self.salt is None else {"cache_salt": self.salt}
        return self.send("GET", path, params={**salt, **parameters})

    def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        salt = {} if self.salt is None else {"cache_salt": self.salt}
        body = {"model": "tiny", **salt, **body}
        return self.send("POST", f"/v1/{path}", json=body, headers=named)

    def says(self, path: str, body: dict[str, Any], **headers: str) -> str:
        """One turn; returns the id of its answer."""
        answer = self.post(path, body, **headers)
        assert answer.status_code == 200, answer.text
        self.ids.append(str(answer.json()["id"]))
        return self.ids[-1]

    def conversation(self, *said: str) -> list[dict[str, Any]]:
        texts = [f"{self.word} words. " * 4, *said]
        roles = ["system", "user", "assistant", "user"]
        return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]

    def plant(self) -> None:
        """Put the word wherever a client can put one."""
        parameters = {"type": "object", "properties": {"path": {"type": "string"}}}
        tool = {"name": f"{self.word}_tool", "description": self.word, "parameters": parameters}
        forced = {"type": "function", "function": {"name": f"{self.word}_tool"}}
        body: dict[str, Any] = {
            "max_tokens": 4,
            "tools": [{"type": "function", "function": tool}],
            "tool_choice": forced,
            "prompt_cache_key": f"{self.word}-cache-key",
            "user": f"{self.word}-user",
            "prompt_cache_options": {"comparison_response_id": None},
        }
        hint = {"session_id": f"{self.word}-hinted", "parent_session_id": self.session}
        hint |= {"next_tools": [{"name": f"{self.word}_tool", "expected_seconds": 5}]}
        coded = base64.urlsafe_b64encode(json.dumps(hint).encode()).decode()
        for text in (f"{self.word} asks", f"Otherwise {self.word} asks"):
            messages = self.conversation(text)
            request_id = f"{self.word}-{uuid.uuid4().hex[:6]}"
            named = {"X_Session_ID": self.session, "X_Request_Id": request_id}
            self.says("chat/completions", {**body, "messages": messages}, **named)
            self.says("chat/completions", {**body, "messages": messages}, X_Agent_Hint=coded)
        system, *messages = self.conversation(f"{self.word} asks")
        asked = {"max_tokens": 4, "system": system["content"], "messages": messages}
        user = {"user_id": f"user_{'a' * 64}_account__session_{uuid.uuid4()}"}
        diagnosed = {"diagnostics": {"previous_message_id": None}, "metadata": user}
        self.says("messages", {**asked, **diagnosed})
        asked = {"max_output_tokens": 4, "instructions": system["content"], "input": self.word}
        self.says("responses", asked, X_Session_ID=f"{self.word}-responses")
        self.says("completions", {"max_tokens": 4, "prompt": f"{self.word} " * 9})
        told = self.asks("/v1/sessions").json()["sessions"]
        self.names = {session["session"] for session in told}


def seen(answer: httpx.Response, *asked: str) -> str:
    """All of an answer as text, without the ids that it was asked for, which errors repeat."""
    lines = [f"{name}: {value}" for name, value in answer.headers.items() if name != "date"]
    text = "\n".join([str(answer.status_code), *lines, answer.text])
    for name in sorted(asked, key=len, reverse=True):
        text = text.replace(name, "")
    return text


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[str]:
    if not (TINY / "config.json").exists():
        pytest.skip("the tiny model is not built: run `make model`")
    log = tmp_path_factory.mktemp("tenants") / "server.log"
    template = ROOT / "benchmarks" / "models" / "smollm2_tools.jinja"
    options = ["--plugin", "stateful", "--stateful-explain", "text", "--max-model-len", "2048"]
    options += ["--served-model-name", "tiny", "--chat-template", str(template)]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    options += ["--stateful-admin-key", "the-operators-key", "--enable-request-id-headers"]
    options += ["--otlp-traces-endpoint", collector.endpoint]
    with LiveServer(TINY, log, *options, environment=ENVIRONMENT) as live:
        yield live.url
        assert live.process.poll() is None, live.last_words()


@pytest.fixture(scope="module")
def clients(url: str) -> list[Client]:
    alice, bob = Client(url, "alice"), Client(url, "bob")
    anonymous = Client(url, "anonymous", has_key=False)
    made = [alice, bob, anonymous, Client(url, "salted", owner=alice)]
    for each in made:
        each.plant()
    return made


def others_of(reader: Client, clients: list[Client]) -> list[Client]:
    return [client for client in clients if client is not reader]


def check(text: str, reader: Client, clients: list[Client], where: object) -> None:
    for other in others_of(reader, clients):
        for planted in other.planted - ({other.key} if other.key == reader.key else set()):
            assert planted not in text, (reader.name, planted, where)


def test_every_route_of_ours_is_known_here(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(endpoint, "_is_on", lambda: True)
    app, stock = FastAPI(), FastAPI()
    endpoint.StatefulEndpoint().attach_router(app)
    known = {getattr(route, "path", None) for route in stock.routes}
    added = [route for route in app.routes if getattr(route, "path", None) not in known]
    routes = {(method, route.path) for route in added for method in route.methods}
    assert routes - {("HEAD", path) for _, path in routes} == ROUTES
    served = httpx.get(f"{url}/openapi.json").json()["paths"]
    ours = {
        (m.upper(), p)
        for p, each in served.items()
        for m in each
        if "sessions" in str(each[m].get("tags"))
    }
    assert ours == {(m, p.replace(":path", "")) for m, p in ROUTES if p != "/stateful"}


def test_each_client_sees_what_it_has_planted(clients: list[Client]) -> None:
    """So that there is something to be seen."""
    for client in clients:
        sessions, turns = client.asks("/v1/sessions").text, client.asks("/v1/turns").json()["turns"]
        assert f'"waits_for":"{client.word}_tool"' in sessions
        for name in (client.session, f"{client.word}-hinted", f"{client.word}-responses"):
            assert name in sessions
        excerpts = [turn["missed"]["before"] for turn in turns if turn["missed"]["before"]]
        assert any(client.word in text for text in excerpts), turns
        for request_id in client.ids:
            assert client.asks(f"/v1/turns/{request_id}").status_code == 200, request_id
        assert len(turns) == len(client.ids)


def test_no_list_or_page_has_anything_of_anothers(url: str, clients: list[Client]) -> None:
    """Every address of the server without an id, ours and vLLM's own."""
    served = httpx.get(f"{url}/openapi.json").json()["paths"]
    paths = {path for path, each in served.items() if "get" in each and "{" not in path}
    paths |= {path for method, path in ROUTES if method == "GET" and "{" not in path}
    assert {"/v1/sessions", "/v1/turns", "/stateful", "/health"} <= paths
    for reader in clients:
        for path in sorted(paths | {"/metrics", "/openapi.json"}):
            for page in PAGES if path.startswith(("/v1/sessions", "/v1/turns")) else [{}]:
                check(seen(reader.asks(path, **page)), reader, clients, (path, page))


def test_what_is_anothers_is_answered_as_if_it_did_not_exist(clients: list[Client]) -> None:
    """Every route with an id, for each id of each other client."""
    routes = [(method, path) for method, path in ROUTES if "{" in path]
    routes.append(("GET", "/v1/responses/{response_id}"))
    for reader in clients:
        salt = {} if reader.salt is None else {"cache_salt": reader.salt}
        for other in others_of(reader, clients):
            ids = [other.session, f"{other.word}-hinted", *other.ids, *other.names]
            for method, path in routes:
                head, _, tail = path.partition("{")
                _, _, tail = tail.partition("}")
                nothing = seen(reader.send(method, f"{head}{UNKNOWN}{tail}", params=salt), UNKNOWN)
                assert nothing.startswith("404"), (path, nothing)
                for name in ids:
                    text = seen(reader.send(method, f"{head}{name}{tail}", params=salt), name)
                    assert bodies(text) == bodies(nothing), (reader.name, name, path)
    for client in clients:
        kept = client.asks(f"/v1/sessions/{client.session}").json()
        assert kept["blocks"] > 0, "another one has closed it"
        assert (kept["turns"], kept["children"]) == (2, [])


def bodies(text: str) -> list[str]:
    """The lines of an answer that do not say how long it is, or which request it was."""
    return [
        each for each in text.split("\n") if not each.startswith(("content-length", "x-request"))
    ]


def test_a_turn_that_names_what_is_anothers_is_told_nothing(clients: list[Client]) -> None:
    """Diagnostics, chains, parents, errors: the answers have no word of the other, headers too."""
    limit = {"max_tokens": 1, "messages": [{"role": "user", "content": "Hello."}]}
    response = {"input": "Hello.", "max_output_tokens": 1}
    for reader in clients:
        for other in others_of(reader, clients):
            of_chat, of_messages, of_response = (other.ids[place] for place in (0, 4, 5))
            asked: list[tuple[str, str, dict[str, Any]]] = [
                (of_messages, "messages", {"diagnostics": {"previous_message_id": of_messages}}),
                (of_chat, "chat/completions", compared_with(of_chat)),
                (of_response, "responses", compared_with(of_response)),
                (of_response, "responses", {"previous_response_id": of_response}),
                (of_chat, "responses", {"previous_response_id": of_chat}),
                (other.session, "chat/completions", {"messages": 7, "user": other.session}),
                (other.session, "chat/completions", {"model": other.session}),
            ]
            for name, path, body in asked:
                answer = reader.post(path, {**(response if path == "responses" else limit), **body})
                check(seen(answer, name), reader, clients, (path, body))
                if answer.status_code == 200 and "diagnostics" in answer.text:
                    assert "not_found" in answer.text, (reader.name, name)


def compared_with(response_id: str) -> dict[str, Any]:
    return {"prompt_cache_options": {"comparison_response_id": response_id}}


def test_unnamed_conversations_that_begin_alike_have_other_ids(clients: list[Client]) -> None:
    alike = {"max_tokens": 1, "messages": [{"role": "user", "content": "Hello, all of you."}]}
    keys = {client.key: client for client in clients if client.salt is None}
    answers = [each.post("chat/completions", alike) for each in keys.values()]
    assert len({answer.headers["x-session-id"] for answer in answers}) == len(keys) == 3


def test_the_commands_show_nothing_of_anothers(
    clients: list[Client], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for reader in clients:
        as_reader = ["--api-key", reader.key, *(["--salt", reader.salt] if reader.salt else [])]
        own = [
            ["explain", "--limit", "200"],
            ["explain", "--json", "--limit", "200"],
            ["top", "--once"],
        ]
        commands = [(words, 0) for words in own]
        for other in others_of(reader, clients):
            commands += [(["explain", name], 1) for name in (*other.ids[:2], UNKNOWN)]
            commands += [(["explain", "--session", name], 1) for name in (other.session, UNKNOWN)]
        for (command, *words), expected in commands:
            status = main([command, reader.url, *words, *as_reader])
            shown = capsys.readouterr()
            text = shown.out + shown.err
            check(text.replace(words[-1], ""), reader, clients, words)
            assert status == expected, (reader.name, words)
            assert status or reader.word in text


def test_no_metric_and_no_span_has_anything_of_any_client(
    url: str, clients: list[Client], collector: Collector
) -> None:
    """The operator reads these. The id of a request is in its span, as in that of vLLM."""
    metrics = httpx.get(f"{url}/metrics").text
    assert "vllm_stateful_turns_total" in metrics
    spans = collector.waited_for("vllm_stateful.turn", sum(len(each.ids) for each in clients))
    told = [dict(map(attribute, span.attributes)) for span in spans]
    for attributes in told:
        attributes.pop("gen_ai.request.id")
    for client in clients:
        for planted in client.planted - client.names:
            assert planted not in metrics
            assert planted not in str(told)
