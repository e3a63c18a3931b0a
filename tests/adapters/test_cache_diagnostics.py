# SPDX-License-Identifier: Apache-2.0
"""What is asked, what is remembered, and what the middleware does to the bytes of an answer."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from starlette.datastructures import Headers

from vllm_stateful.adapters.frontend import cache_diagnostics
from vllm_stateful.adapters.frontend.cache_diagnostics import Diagnosis, begin
from vllm_stateful.adapters.frontend.openai_diagnostics import OpenAIDiagnostics
from vllm_stateful.observe.diagnosis_counts import DiagnosisCounts
from vllm_stateful.session import Fingerprints

OWNER = ("tenant", "salt")
BODY = {"model": "m", "input": "hi", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> DiagnosisCounts:
    """The totals, and a memory, of this test alone."""
    made = DiagnosisCounts()
    monkeypatch.setattr(cache_diagnostics, "DIAGNOSIS_COUNTS", made)
    monkeypatch.setattr(cache_diagnostics, "_fingerprints", Fingerprints())
    return made


def request(path: str = "/v1/responses", **headers: str) -> Any:
    scope = {"type": "http", "path": path, "state": {}}
    return SimpleNamespace(scope=scope, state=SimpleNamespace(), headers=Headers(headers))


def asks(compared: Any) -> dict[str, Any]:
    return {"prompt_cache_options": {"comparison_response_id": compared}}


def diagnosed(path: str, *, is_on: bool = True, **fields: Any) -> Diagnosis:
    made = begin(request(path), {**BODY, **fields}, OWNER, is_on=is_on)
    assert made is not None
    return made


def test_what_is_off_is_unavailable(counts: DiagnosisCounts) -> None:
    diagnosed("/v1/responses").answered("r", 9)
    off = diagnosed("/v1/responses", is_on=False, **asks("r"))
    assert off.of_responses(None) == {"type": "unavailable"}
    message = diagnosed("/v1/messages", is_on=False, diagnostics={"previous_message_id": "r"})
    assert message.of_messages() == {"cache_miss_reason": {"type": "unavailable"}}
    first = diagnosed("/v1/messages", is_on=False, diagnostics={})
    assert first.of_messages() is None
    assert counts.snapshot() == {"cache_diagnostics": {"unavailable": 2, "first": 1}}
    off.answered("s", 9)
    on = diagnosed("/v1/responses", **asks("s"))
    assert on.of_responses(None) == {"type": "comparison_response_not_found"}


def test_what_is_not_known_here_may_be_known_to_another_api_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_diagnostics, "_others", cache_diagnostics._OtherServers())
    unknown = {"diagnostics": {"previous_message_id": "r"}}
    reason = {"type": "previous_message_not_found"}
    assert diagnosed("/v1/messages", **unknown).of_messages() == {"cache_miss_reason": reason}
    cache_diagnostics.watch(SimpleNamespace(client_count=2))
    reason = {"type": "unavailable"}
    assert diagnosed("/v1/messages", **unknown).of_messages() == {"cache_miss_reason": reason}
    assert diagnosed("/v1/responses", **asks("r")).of_responses(None) == reason
    diagnosed("/v1/responses").answered("r", 9)
    assert diagnosed("/v1/responses", **asks("r")).of_responses(8) == {"type": "cache_hit"}


@pytest.mark.parametrize(
    ("path", "fields", "is_remembered"),
    [
        ("/v1/messages", {}, False),
        ("/v1/messages", {"diagnostics": None}, False),
        ("/v1/messages", {"diagnostics": {}}, True),
        ("/v1/chat/completions", {}, False),
        ("/v1/chat/completions", {"prompt_cache_options": {}}, True),
        ("/v1/responses", {}, True),
        ("/behind-a-proxy/v1/responses", {}, True),
        ("/v1/completions", {"diagnostics": {}}, False),
    ],
)
def test_who_is_remembered(path: str, fields: dict[str, Any], is_remembered: bool) -> None:
    made = begin(request(path), {**BODY, **fields}, OWNER, is_on=True)
    assert (made is not None) is is_remembered


def test_a_request_that_did_not_come_over_http_is_left_alone() -> None:
    assert begin(None, BODY, OWNER, is_on=True) is None
    assert begin(SimpleNamespace(headers={}), BODY, OWNER, is_on=True) is None


def test_a_body_too_deep_to_be_written_fails_nothing() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    made = diagnosed("/v1/responses", input=deep, **asks("r"))
    assert made.of_responses(None) == {"type": "unavailable"}


def test_the_numbers_say_whether_anything_was_missed() -> None:
    diagnosed("/v1/responses").answered("r", 100)
    later = diagnosed("/v1/responses", service_tier="flex", **asks("r"))
    miss = {"type": "cache_miss", "reason": "service_tier_changed"}
    missed_60 = {**miss, "comparison_reusable_tokens": 100, "cache_missed_tokens": 60}
    assert later.of_responses(40) == missed_60
    assert later.of_responses(None) == {**missed_60, "cache_missed_tokens": 100}
    assert later.of_responses(99) == later.of_responses(250) == {"type": "cache_hit"}

    diagnosed("/v1/responses").answered("uncounted", None)
    later = diagnosed("/v1/responses", service_tier="flex", **asks("uncounted"))
    assert "comparison_reusable_tokens" not in later.of_responses(40)


# ---- the middleware ----------------------------------------------------------------------

UNKNOWN = b',"prompt_cache_diagnostics":{"type":"comparison_response_not_found"}}'


def sent(
    answer: list[dict[str, Any]], fields: dict[str, Any], path: str = "/v1/responses"
) -> list[dict[str, Any]]:
    """What the server sends of an answer of the application's."""
    messages: list[dict[str, Any]] = []
    made = request(path)
    begin(made, {**BODY, **fields}, OWNER, is_on=True)
    scope = {**made.scope, "state": vars(made.state)}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in answer:
            await send(message)

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(OpenAIDiagnostics(app)(scope, None, send))
    return messages


def start(kind: bytes, status: int = 200, **more: bytes) -> dict[str, Any]:
    headers = [(b"content-type", kind), *((n.encode(), v) for n, v in more.items())]
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


JSON = b"application/json"
ANSWER = b'{"id": "r2", "status":"completed", "usage":{"input_tokens":7},"x":"\xc3\xbc \\u00fc"}'


@pytest.mark.parametrize("cut", [0, 5, len(ANSWER)])
def test_the_field_comes_last_and_the_rest_stays_byte_by_byte(cut: int) -> None:
    head = start(JSON, **{"content-length": str(len(ANSWER)).encode(), "x-other": b"1"})
    got = sent([head, body(ANSWER[:cut], more=True), body(ANSWER[cut:])], asks("unknown"))
    assert [message["type"] for message in got] == ["http.response.start", "http.response.body"]
    whole = ANSWER[:-1] + UNKNOWN
    assert got[1]["body"] == whole
    assert dict(got[0]["headers"])[b"content-length"] == str(len(whole)).encode()
    assert dict(got[0]["headers"])[b"x-other"] == b"1"
    found = sent([start(JSON), body(ANSWER)], asks("r2"))
    assert json.loads(found[1]["body"])["prompt_cache_diagnostics"] == {"type": "cache_hit"}


@pytest.mark.parametrize(
    ("head", "data"),
    [
        (start(JSON, 400), b'{"error": 1}'),
        (start(JSON, **{"content-encoding": b"gzip"}), b"\x1f\x8b"),
        (start(JSON), b"no json"),
        (start(JSON), b"[1]"),
        (start(JSON), b'{"id": "r", "status": "queued"}'),
        (start(b"text/event-stream"), b"event: response.completed\ndata: no json\n\n"),
        (start(b"text/event-stream"), b"event: response.created\ndata: {}\n\n"),
    ],
)
def test_any_other_answer_stays_as_it_is(head: dict[str, Any], data: bytes) -> None:
    answer = [head, body(data)]
    assert sent(answer, asks("unknown")) == answer


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/models"])
def test_whoever_does_not_ask_gets_the_same_messages(path: str) -> None:
    answer = [start(JSON), body(ANSWER[:9], more=True), body(ANSWER[9:])]
    assert sent(answer, {}, path) == answer


def test_a_stream_is_not_held() -> None:
    event = {"type": "response.completed", "response": json.loads(ANSWER)}
    final = b"event: response.completed\ndata: " + json.dumps(event).encode() + b"\n\n"
    others = [b"event: response.created\ndata: {}\n\n", b": keep-alive\n\n"]
    answer = [start(b"text/event-stream; charset=utf-8")]
    answer += [body(each, more=True) for each in (*others, final)] + [body(b"")]
    got = sent(answer, asks("unknown"))
    assert got[:3] == answer[:3]
    assert got[4] == answer[4]
    response = json.loads(got[3]["body"].partition(b"data: ")[2])["response"]
    expected = {"type": "comparison_response_not_found"}
    assert response == {**json.loads(ANSWER), "prompt_cache_diagnostics": expected}


def chunk(**fields: Any) -> bytes:
    made = json.dumps({"id": "c", **fields}, separators=(",", ":"))
    return f"data: {made}\n\n".encode()


ENDS = chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
USAGE = chunk(choices=[], usage={"prompt_tokens": 7})
TALK = chunk(choices=[{"index": 0, "delta": {"content": '"finish_reason":"stop"'}}])


@pytest.mark.parametrize(("wants_usage", "place"), [(False, 2), (True, 4)])
def test_a_chat_stream_says_it_once_where_the_numbers_are(wants_usage: bool, place: int) -> None:
    events = [TALK, ENDS, ENDS, USAGE, b"data: [DONE]\n\n"]
    answer = [start(b"text/event-stream"), *(body(each, more=True) for each in events)]
    fields = {**asks("unknown"), "stream_options": {"include_usage": wants_usage}}
    got = sent(answer, fields, "/v1/chat/completions")
    changed = [
        number for number, pair in enumerate(zip(answer, got, strict=True)) if pair[0] != pair[1]
    ]
    assert changed == [place]
    stock = answer[place]["body"]
    assert got[place]["body"] == stock.removesuffix(b"}\n\n") + UNKNOWN + b"\n\n"
    remembered = diagnosed("/v1/chat/completions", **asks("c"))
    assert remembered.before is not None
    assert remembered.before.num_prompt == 7


def test_what_was_read_and_written_can_be_reused() -> None:
    details = {"cached_tokens": 4, "cache_write_tokens": 2}
    usage = {"input_tokens": 7, "input_tokens_details": details}
    answer = json.dumps({"id": "r", "status": "completed", "usage": usage}).encode()
    sent([start(JSON), body(answer)], {})
    remembered = diagnosed("/v1/responses", **asks("r"))
    assert remembered.before is not None
    assert remembered.before.num_prompt == 6
