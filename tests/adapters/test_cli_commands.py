# SPDX-License-Identifier: Apache-2.0
"""`vllm-stateful explain` and `top` against the routes of a server, over HTTP."""

import json
from collections.abc import Iterator

import pytest
from recorded_engine import HISTORY, Engine
from served_engine import serving

from vllm_stateful.adapters.frontend.identity import salt_of
from vllm_stateful.cli.__main__ import main

KEY = "a-key"
SESSION = "session-of-mine"
WIDE = "200"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server over the scheduler of one engine, with two turns of one session."""
    engine = Engine(num_blocks=81)
    salt = salt_of({"authorization": f"Bearer {KEY}"}, None)
    history = engine.turn("chatcmpl-1", HISTORY, SESSION, cache_salt=salt)
    engine.turn("chatcmpl-2", [*history[:18], 77, 1], SESSION, cache_salt=salt)
    with serving() as served:
        served.engine = engine
        yield served.url


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def test_explain_shows_the_last_turns(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "explain", url, "--api-key", KEY)
    second, first = text.split("chatcmpl-")[2:0:-1][::-1]
    assert "The history changed at token 18" in second
    assert "The first turn of its session." in first
    assert f"(session {SESSION})" in second


@pytest.mark.parametrize("end", ["", "/", "/v1"])
def test_one_turn_by_its_id(url: str, end: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "explain", url + end, "chatcmpl-1", "--api-key", KEY)
    assert "The first turn of its session." in text
    assert "chatcmpl-2" not in text


def test_the_turns_of_a_session_as_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "explain", url, "--session", SESSION, "--json", "--api-key", KEY)
    assert [turn["request_id"] for turn in json.loads(text)] == ["chatcmpl-2", "chatcmpl-1"]


def test_without_the_key_there_is_nothing(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "explain", url, "--api-key", "") == "No turn is remembered.\n"


def test_top_shows_sessions_and_turns(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", WIDE)
    text = said(capsys, "top", url, "--once", "--api-key", KEY)
    assert SESSION in text
    assert "waits for user" in text
    assert "changed at token 18" in text


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["explain", "{url}", "nobody-knows"], "no turn 'nobody-knows' is remembered"),
        (["explain", "{url}", "--session", "nobody-knows"], "no session 'nobody-knows'"),
        (["explain", "http://127.0.0.1:9"], "http://127.0.0.1:9"),
        (["top", "http://127.0.0.1:9", "--once"], "http://127.0.0.1:9"),
        (["explain", "{url}", "--limit", "0"], "422"),
    ],
)
def test_what_fails_is_one_line(
    url: str, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(url=url) for word in words]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert reason in shown.err
    assert shown.err.count("\n") == 1


def test_an_option_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["top", "http://127.0.0.1:9", "--no-such-option"])
    assert ended.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err
