# SPDX-License-Identifier: Apache-2.0
"""What the engine core remembers of each turn, and the reasons that it gives for what is missed."""

import time
from typing import Any

import pytest
from recorded_engine import ALICE, BOB, HISTORY, Engine
from simulated_engine import VOCAB
from simulated_groups import MARKERS
from simulated_tier import offloading
from test_offload_steps import forget_free_blocks

from vllm_stateful.adapters.engine import scheduler
from vllm_stateful.adapters.engine.turn_records import decoder
from vllm_stateful.config import process_config
from vllm_stateful.types import Demotion

IM_START, THINK, THINK_END, TOOL_CALL = range(VOCAB - len(MARKERS), VOCAB)
SALT = "salt-of-somebody"


def asked(engine: Engine, operation: str, **arguments: Any) -> Any:
    arguments.setdefault("cache_salt", None)
    answer = engine.scheduler.stateful(operation, arguments)
    return next(iter(answer.values()))


def turn_of(engine: Engine, request_id: str, **arguments: Any) -> dict[str, Any]:
    (record,) = asked(engine, "turn", request_id=request_id, **arguments)
    return dict(record)


def missed_by(engine: Engine, request_id: str, **arguments: Any) -> dict[str, Any]:
    return dict(turn_of(engine, request_id, **arguments)["missed"])


def test_an_appended_turn_has_missed_nothing(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.now = 7.0
    engine.turn("second", [*history, 1, 2], max_tokens=3)
    first, second = turn_of(engine, "first"), turn_of(engine, "second")
    assert first["missed"] == {"cause": "never_seen", "num_tokens": 0, "num_behind_snapshot": 0}
    assert second["missed"]["cause"] == "none"
    assert second["outcome"] == "resumed"
    assert (second["prompt_tokens"], second["reused_tokens"]) == (25, 22)
    assert (second["computed_tokens"], second["output_tokens"]) == (3, 3)
    assert second["waited_for"] == "user"
    assert second["ended"] == "length"
    assert second["kept"]
    assert second["first_token_s"] == 0.0  # the clock stands still
    assert second["queue_s"] >= 0.0


def test_a_branch_that_is_lost_is_no_reason_while_the_history_is_kept(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("branch", [*HISTORY[:4], *range(40, 76)], session_id=ALICE, max_tokens=9)
    engine.step()
    request = engine.scheduler.requests["branch"]
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)
    engine.abort("branch")
    engine.run()
    engine.turn("second", [*history, 1])
    assert missed_by(engine, "second")["cause"] == "none"


@pytest.mark.parametrize("place", [3, 17, 20])
def test_a_changed_history_names_the_first_token_that_differs(engine: Engine, place: int) -> None:
    """Also where too little is the same to be worth a copy."""
    history = engine.turn("first", HISTORY)
    engine.turn("second", [*history[:place], 77, *history[place + 1 :], 1])
    missed = missed_by(engine, "second")
    assert missed["cause"] == "changed"
    assert missed["token"] == place
    assert missed["num_tokens"] == 22 - turn_of(engine, "second")["reused_tokens"]


def test_a_change_is_told_by_message_and_kind(options: dict[str, Any]) -> None:
    """ChatML: system, user, an answer that thinks and calls, its result, and so on.

    Roles are words here, which the rules do not know, so only marked parts have a kind.
    """
    engine = Engine(**options | {"num_blocks": 200}, has_markers=True)
    prompt = [IM_START, 1, 2, 3, *range(20, 40), IM_START, 4, 5, THINK, 6, 7, THINK_END, 8, 9]
    history = engine.turn("first", prompt)
    engine.turn("second", [*history[:28], 50, *history[29:], 1])
    missed = missed_by(engine, "second")
    assert missed["cause"] == "changed"
    assert missed["token"] == 28
    assert missed["kind"] == "other"


def test_text_of_both_histories_is_kept_only_where_asked_for(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_EXPLAIN", "text")
    engine = Engine(**options, has_markers=True)
    history = engine.turn("first", HISTORY)
    engine.turn("second", [*history[:18], 77, 1])
    missed = missed_by(engine, "second")
    assert missed["before"].startswith("word18 word19")
    assert missed["now"] == "word77 word1 "
    monkeypatch.setenv("VLLM_STATEFUL_EXPLAIN", "places")
    process_config.cache_clear()
    quiet = Engine(**options, has_markers=True)
    history = quiet.turn("first", HISTORY)
    quiet.turn("second", [*history[:18], 77, 1])
    assert {"before", "now"}.isdisjoint(missed_by(quiet, "second"))


def test_with_explain_off_nothing_is_remembered(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_EXPLAIN", "off")
    engine = Engine(**options)
    engine.turn("first", HISTORY)
    assert asked(engine, "turns") == asked(engine, "sessions") == []
    assert asked(engine, "turn", request_id="first") == []


def test_a_session_whose_kv_was_given_back_says_why_and_when(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.now = 100.0
    (kept,) = engine.branches(ALICE)
    engine.store.demote(kept, Demotion.PRESSURE)
    forget_free_blocks(engine)
    engine.now = 160.0
    engine.turn("second", [*history, 1])
    missed = missed_by(engine, "second")
    assert missed["cause"] == "evicted"
    assert missed["why_gone"] == "pressure"
    assert (missed["gone_s"], missed["idle_s"]) == (60.0, 100.0)
    assert missed["num_tokens"] == 22


def test_what_is_left_of_a_session_counts_as_reused(engine: Engine) -> None:
    history = engine.turn("first", list(range(50)))
    (kept,) = engine.branches(ALICE)
    engine.store._cut_back(kept, 24, Demotion.BUDGET)
    forget_free_blocks(engine)
    engine.turn("second", [*history, 1])
    missed = missed_by(engine, "second")
    assert (missed["cause"], missed["why_gone"]) == ("evicted", "budget")
    assert missed["num_tokens"] == 50 - 24


def test_what_the_tier_has_is_not_missed(options: dict[str, Any]) -> None:
    engine = Engine(**options, kv_transfer=offloading(200))
    history = engine.turn("first", list(range(50)))
    engine.manager.store.drop_all()
    forget_free_blocks(engine)
    engine.turn("second", [*history, 1])
    record = turn_of(engine, "second")
    assert record["outcome"] == "restored"
    assert (record["reused_tokens"], record["loaded_tokens"]) == (0, 48)
    assert record["missed"]["num_tokens"] == 2


def test_a_hybrid_model_says_that_a_resume_point_is_missing() -> None:
    engine = Engine(num_blocks=200, kinds=("state", "full"))
    history = engine.turn("first", list(range(60)), max_tokens=4)
    engine.turn("second", [*history[:41], 99, 98])
    missed = missed_by(engine, "second")
    assert (missed["cause"], missed["token"]) == ("changed", 41)
    reused = turn_of(engine, "second")["reused_tokens"]
    assert missed["num_behind_snapshot"] == 41 - reused > 0


def test_a_fork_has_a_parent_and_the_parent_a_child(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.turn("fork", [*history, 5], BOB)
    (bob,) = asked(engine, "session", session_ids=[BOB])
    (alice,) = asked(engine, "session", session_ids=[ALICE])
    assert (bob["parent"], alice["children"]) == (ALICE, [BOB])
    assert turn_of(engine, "fork")["outcome"] == "forked"


def test_conversations_that_nobody_named_are_told_apart(options: dict[str, Any]) -> None:
    """They begin alike, and are no changes of one another unless a question is asked again."""
    engine = Engine(**options | {"num_blocks": 300}, has_markers=True)
    system = [IM_START, *range(1, 40)]
    engine.turn("one", [*system, IM_START, 50, 51, 52], None)
    engine.turn("two", [*system, IM_START, 60, 61, 62], None)
    assert missed_by(engine, "two")["cause"] == "never_seen"


def test_a_preempted_turn_leaves_no_session_running(options: dict[str, Any]) -> None:
    engine = Engine(**options)
    history = engine.turn("first", HISTORY, None)
    engine.add("second", [*history, 1], session_id=None, max_tokens=6)
    engine.step()
    request = engine.scheduler.requests["second"]
    if engine.scheduler.reset_prefix_cache(reset_running_requests=True):
        engine.run()
    assert request.is_finished()
    assert {each["running"] for each in asked(engine, "sessions")} == {0}


def test_a_turn_that_is_too_large_to_be_kept_says_so(options: dict[str, Any]) -> None:
    engine = Engine(**options)
    engine.turn("large", [n % 90 for n in range(100)])
    assert not engine.branches(ALICE)
    assert not turn_of(engine, "large")["kept"]
    engine.turn("small", HISTORY, BOB)
    engine.turn("again", HISTORY, BOB)  # what it computes is there
    assert turn_of(engine, "again")["kept"]
    (bob,) = asked(engine, "session", session_ids=[BOB])
    assert bob["demoted"] is None


def test_nobody_is_told_of_what_has_another_salt(engine: Engine) -> None:
    engine.turn("mine", HISTORY, ALICE, cache_salt=SALT)
    engine.turn("theirs", HISTORY, BOB)
    for salt, name, other in ((SALT, "mine", "theirs"), (None, "theirs", "mine")):
        session_id, foreign = (ALICE, BOB) if name == "mine" else (BOB, ALICE)
        assert [s["session_id"] for s in asked(engine, "sessions", cache_salt=salt)] == [session_id]
        assert [t["request_id"] for t in asked(engine, "turns", cache_salt=salt)] == [name]
        assert asked(engine, "turn", cache_salt=salt, request_id=other) == []
        assert asked(engine, "session", cache_salt=salt, session_ids=[foreign]) == []
        assert asked(engine, "turns", cache_salt=salt, session_ids=[foreign]) == []
    assert len(asked(engine, "sessions", sees_all=True)) == 2


def test_a_session_tells_what_it_waits_for(engine: Engine) -> None:
    engine.manager.called_tool = lambda request: "bash"
    engine.add("first", HISTORY, session_id=ALICE, max_tokens=2)
    engine.step()
    (running,) = asked(engine, "sessions")
    assert (running["state"], running["running"]) == ("running", 1)
    engine.run()
    engine.now = 5.0
    (waiting,) = asked(engine, "sessions")
    assert (waiting["state"], waiting["waits_for"]) == ("waits_for_tool", "bash")
    assert (waiting["idle_s"], waiting["blocks"], waiting["tokens"]) == (5.0, 6, 23)
    engine.turn("second", [*HISTORY, 1, 2, 3])
    assert turn_of(engine, "second")["waited_for"] == "bash"
    engine.scheduler.stateful("close", {"session_ids": [ALICE], "cache_salt": None})
    (closed,) = asked(engine, "sessions")
    assert closed["state"] == "closed"
    assert closed["blocks"] == 0


def test_a_session_tells_when_its_turn_to_go_comes(options: dict[str, Any]) -> None:
    """What it tells is what happens. A session that runs, or keeps nothing, has no place."""
    engine = Engine(**options | {"num_blocks": 200})
    names = [f"session-{number}" for number in range(4)]

    def place(name: str) -> int | None:
        (told,) = asked(engine, "session", session_ids=[name])
        found: int | None = told["eviction_place"]
        return found

    for number, name in enumerate(names):
        engine.now = float(number)
        engine.turn(name, [90 + number, *HISTORY], name)
    engine.turn("branch", [80, *HISTORY], names[0])  # it goes when both of its histories have gone
    engine.now = 50.0
    order = sorted(names, key=lambda name: place(name) or 0)
    assert [place(name) for name in order] == [0, 1, 2, 3]
    for name in order:
        assert place(name) == 0
        while engine.branches(name):
            engine.store.demote_next(Demotion.PRESSURE)
        assert place(name) is None
    engine.turn("kept", HISTORY, ALICE)
    assert place(ALICE) == 0
    engine.add("runs", [*HISTORY, 1], session_id=ALICE, max_tokens=4)
    engine.step()
    assert place(ALICE) is None
    engine.run()
    assert place(ALICE) == 0
    assert "eviction_place" not in asked(engine, "sessions")[0]
    engine.now = 60.0
    engine.turn("other", HISTORY, BOB, cache_salt=SALT)
    for sees_all in (False, True):
        seen = {"session_ids": [BOB], "cache_salt": SALT, "sees_all": sees_all}
        (told,) = asked(engine, "session", **seen)
        assert told["eviction_place"] == int(sees_all)


@pytest.mark.parametrize(
    "request_id",
    [
        "chatcmpl-abc-12345678",
        "0_chatcmpl-abc-12345678",
        "chatcmpl-abc-0-12345678",
        "chatcmpl-abc_1-12345678",
    ],
)
def test_a_turn_is_found_by_the_id_that_the_client_knows(engine: Engine, request_id: str) -> None:
    engine.turn(request_id, HISTORY)
    assert turn_of(engine, "chatcmpl-abc")["request_id"] == request_id


def test_an_id_of_a_client_may_end_with_a_number(engine: Engine) -> None:
    engine.turn("chatcmpl-run-42-12345678", HISTORY)
    assert turn_of(engine, "chatcmpl-run-42")["session_id"] == ALICE


def test_two_clients_may_use_one_name(engine: Engine) -> None:
    engine.turn("mine-11111111", HISTORY)
    engine.turn("mine-22222222", HISTORY, BOB, cache_salt=SALT)
    assert turn_of(engine, "mine")["session_id"] == ALICE
    assert turn_of(engine, "mine", cache_salt=SALT)["session_id"] == BOB


def test_text_that_cannot_be_read_ends_nothing() -> None:
    class Broken:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 1, "b": 2}

        def decode(self, ids: list[int]) -> str:
            if ids == [2]:
                raise OverflowError("out of range")
            return f"{ids}"

    decode = decoder(Broken(), "text")
    assert decode is not None
    assert decode([1, -7, 2, 1 << 30]) == "[1, 2]"
    assert decode([2]) == ""
    assert decoder(Broken(), "places") is decoder(None, "text") is None


def test_a_turn_that_only_vllms_own_cache_served_is_not_cold(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.scheduler.stateful("close", {"session_ids": [ALICE], "cache_salt": None})
    engine.turn("second", [*history, 1])
    forget_free_blocks(engine)
    engine.scheduler.stateful("close", {"session_ids": [ALICE], "cache_salt": None})
    forget_free_blocks(engine)
    engine.turn("third", [*history, 1])
    records = [turn_of(engine, name) for name in ("first", "second", "third")]
    found = [(record["outcome"], record["reused_tokens"]) for record in records]
    assert found == [("cold", 0), ("cached", 20), ("cold", 0)]


def test_ended_turns_are_noted_for_spans_only_where_vllm_sends_traces(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Engine(**options)
    quiet.turn("first", HISTORY)
    assert asked_for_ended(quiet) == []
    monkeypatch.setattr(scheduler._StatefulMixin, "_is_traced", lambda _: True)
    engine = Engine(**options)
    request = engine.add("first-0a1b2c3d", HISTORY, session_id=ALICE, max_tokens=1)
    request.trace_headers = {"traceparent": "00-a-b-01", "tracestate": "x" * 513}
    engine.run()
    (ended,) = asked_for_ended(engine)
    assert ended["headers"] == {"traceparent": "00-a-b-01"}
    assert ended["turn"]["client_id"] == "first"
    assert ended["turn"]["missed"]["cause"] == "never_seen"
    assert ended["at"] == pytest.approx(time.time(), abs=60)
    assert asked_for_ended(engine) == []
    engine.turn("second", [*HISTORY, 1])
    assert [each["headers"] for each in asked_for_ended(engine)] == [{}]


def asked_for_ended(engine: Engine) -> list[dict[str, Any]]:
    found = engine.scheduler.stateful("ended", {})["ended"]
    return list(found)
