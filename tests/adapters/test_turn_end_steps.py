# SPDX-License-Identifier: Apache-2.0
"""How turns and sessions end, what stays stock, and that nothing is ever lost."""

from types import SimpleNamespace
from typing import Any

import pytest
from recorded_engine import ALICE, BOB, HISTORY, Engine, closing_hint
from simulated_engine import expected_answer
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope
from vllm.v1.request import RequestStatus

from vllm_stateful.adapters.engine.invariants import check_pool
from vllm_stateful.request.session_identity import ids_of_client
from vllm_stateful.transport.wire import TOOL_ACTION
from vllm_stateful.types import Bypass, Demotion, Outcome

TINY_IMAGE = SimpleNamespace(mm_position=SimpleNamespace(length=3))

# ---- ends of turns ---------------------------------------------------------------------------


def test_an_abort_while_running_keeps_what_was_computed_and_the_next_turn_resumes(
    engine: Engine,
) -> None:
    engine.add("first", HISTORY, session_id=ALICE, max_tokens=50)
    for _ in range(6):
        engine.step()
    engine.abort("first")
    said = engine.answer("first")
    engine.run()
    (kept,) = engine.branches(ALICE)
    assert kept.frontier >= 22
    assert kept.tokens.tolist() == [*HISTORY, *said][: kept.frontier]
    prompt = [*HISTORY, *said, 1]
    engine.turn("second", prompt)
    assert engine.num_scheduled("second") == len(prompt) - kept.frontier <= 3
    assert engine.outcomes() == {"cold": 1, "resumed": 1}


def test_an_abort_in_the_middle_of_the_prompt_keeps_the_part_that_is_computed(
    engine: Engine,
) -> None:
    prompt = [n % 100 for n in range(150)]
    engine.add("first", prompt, session_id=ALICE)
    engine.step()
    engine.abort("first")
    engine.run()
    (kept,) = engine.branches(ALICE)
    assert kept.tokens.tolist() == prompt[: kept.frontier]
    engine.turn("second", prompt)
    assert engine.num_scheduled("second") == 150 - kept.frontier


def test_an_abort_of_a_turn_that_never_ran_keeps_nothing_and_spares_the_session(
    engine: Engine,
) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("second", [*history, 1], session_id=ALICE)
    engine.abort("second")
    engine.run()
    assert len(engine.branches(ALICE)) == 1
    engine.turn("third", [*history, 2])
    assert engine.num_scheduled("third") == 2


def test_a_turn_that_ended_in_an_error_is_not_kept(engine: Engine) -> None:
    engine.add("first", HISTORY, session_id=ALICE, max_tokens=50)
    for _ in range(4):
        engine.step()
    engine.scheduler.finish_requests("first", RequestStatus.FINISHED_ERROR)
    engine.run()
    assert engine.store.num_sessions == 0


@pytest.mark.parametrize("running_too", [False, True], ids=["keep-running", "restart-running"])
def test_after_a_reset_only_what_was_computed_since_is_kept(
    engine: Engine, running_too: bool
) -> None:
    """A turn that goes on over old KV keeps nothing; one that starts again may be kept."""
    engine.turn("idle", [60, *HISTORY], BOB)
    engine.add("running", HISTORY, session_id=ALICE, max_tokens=8)
    for _ in range(3):
        engine.step()
    while running_too and engine.in_flight:
        engine.scheduler.update_from_output(*engine.in_flight.popleft())
    engine.scheduler.reset_prefix_cache(reset_running_requests=running_too)
    assert engine.store.num_sessions == 0
    assert engine.demotions() == {"reset": 1}
    engine.run()
    assert engine.answer("running") == expected_answer(HISTORY, 8)
    assert len(engine.branches(ALICE)) == int(running_too)
    assert engine.store.num_sessions == int(running_too)


def test_a_reset_under_a_turn_that_borrowed_leaves_it_running_and_drops_its_session(
    engine: Engine,
) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("second", [*history, 1], session_id=ALICE, max_tokens=8)
    for _ in range(3):
        engine.step()
    engine.scheduler.reset_prefix_cache()
    engine.run()
    assert engine.answer("second") == expected_answer([*history, 1], 8)
    assert engine.store.num_sessions == 0
    engine.turn("third", [*HISTORY, 55])
    assert engine.store.num_sessions == 1


def test_the_last_turn_of_a_session_keeps_nothing(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.outputs.clear()
    last = engine.add("last", [*history, 1], session_id=ALICE, max_tokens=2)
    last.kv_hints = closing_hint()
    engine.run()
    assert engine.answer("last") == expected_answer([*history, 1], 2)
    assert engine.num_scheduled("last") == 3
    assert engine.store.num_sessions == 0
    assert engine.store.pins.num_pinned == 0


def test_the_end_of_a_session_is_counted_as_closed_not_as_preempted(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("last", [*history, 1], session_id=ALICE).kv_hints = closing_hint()
    engine.run()
    assert engine.demotions() == {"closed": 1}


def test_a_session_that_is_closed_has_what_vllms_own_cache_has(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    close = {"session_ids": [ALICE], "cache_salt": None}
    assert engine.scheduler.stateful("close", close) == {"closed": 1}
    assert engine.scheduler.stateful("close", close) == {"closed": 0}
    assert engine.demotions() == {"closed": 1}
    engine.turn("second", [*history, 1])
    assert engine.outcomes() == {"cold": 1, "cached": 1}


def test_a_session_is_closed_by_the_id_that_its_client_sent(engine: Engine) -> None:
    sent = "0a1b2c3d-session-of-codex"
    engine.turn("first", HISTORY, session_id=f"codex:{sent}")
    close = {"session_ids": ids_of_client(sent), "cache_salt": None}
    assert engine.scheduler.stateful("close", close) == {"closed": 1}


def test_a_turn_that_continues_a_session_and_ends_in_an_error_is_counted_as_such(
    engine: Engine,
) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("second", [*history, 1], session_id=ALICE, max_tokens=8)
    engine.step()
    engine.scheduler.finish_requests("second", RequestStatus.FINISHED_ERROR)
    engine.run()
    assert engine.demotions() == {"error": 1}


def test_what_the_next_turn_can_read_counts_as_created(engine: Engine) -> None:
    """The partly filled last block too, which vLLM leaves out."""
    history = engine.turn("first", HISTORY)
    assert engine.created == len(HISTORY)
    engine.turn("second", [*history, 1, 2])
    assert engine.created == 3, "the answer, whose KV was not computed before, and two new tokens"


def test_a_named_tool_is_waited_for(engine: Engine) -> None:
    action = KvHintAction("0", TOOL_ACTION, "1", {"name": "get_weather"})
    engine.add("first", HISTORY, session_id=ALICE, max_tokens=1)
    engine.scheduler.requests["first"].kv_hints = KvHintsEnvelope("test", "hint", [action])
    engine.run()
    waits = engine.scheduler.stateful("stats", {})["waits"]
    assert waits == {"tool": 1, "user": 0, "one_shot": 0}


def test_a_session_that_is_closed_while_its_turn_runs_keeps_nothing_after_it(
    engine: Engine,
) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("second", [*history, 1], session_id=ALICE, max_tokens=8)
    for _ in range(3):
        engine.step()
    close = {"session_ids": [ALICE], "cache_salt": None}
    assert engine.scheduler.stateful("close", close) == {"closed": 1}
    engine.run()
    assert engine.answer("second") == expected_answer([*history, 1], 8)
    assert engine.store.num_sessions == 0
    assert engine.demotions() == {"closed": 1}
    engine.turn("third", [*history, 2])
    assert len(engine.branches(ALICE)) == 1


def test_the_last_turn_of_a_session_ends_its_parallel_branches_too(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("a", [*history, 1], session_id=ALICE, max_tokens=2)
    engine.add("b", [*history, 2], session_id=ALICE, max_tokens=6).kv_hints = closing_hint()
    engine.run()
    assert engine.store.num_sessions == 0


def test_a_close_under_another_salt_closes_nothing(engine: Engine) -> None:
    engine.turn("first", HISTORY, cache_salt="tenant-a")
    for salt in (None, "tenant-b"):
        arguments = {"session_ids": [ALICE], "cache_salt": salt}
        assert engine.scheduler.stateful("close", arguments) == {"closed": 0}


def test_an_idle_session_gives_its_blocks_back_with_the_next_step(engine: Engine) -> None:
    engine.turn("first", HISTORY)
    engine.now = 899.0
    engine.turn("other", [50, *HISTORY], BOB)
    assert len(engine.branches(ALICE)) == 1
    engine.now = 901.0
    engine.turn("another", [51, *HISTORY], "session-carol")
    assert engine.branches(ALICE) == ()
    assert len(engine.branches(BOB)) == 1
    assert engine.demotions() == {"idle": 1}


def test_a_long_turn_does_not_expire_while_it_runs(engine: Engine) -> None:
    history = engine.turn("first", HISTORY)
    engine.add("second", [*history, 1], session_id=ALICE, max_tokens=10)
    engine.step()
    engine.now = 5000.0
    engine.run()
    assert len(engine.branches(ALICE)) == 1
    assert engine.demotions() == {}


# ---- requests that stay stock ----------------------------------------------------------------


def test_prompt_logprobs_are_bypassed_counted_once_and_leave_the_session_alone(
    engine: Engine,
) -> None:
    history = engine.turn("first", HISTORY)
    engine.turn("scored", [*history, 1], prompt_logprobs=1)
    assert engine.num_scheduled("scored") == len(history) + 1
    assert engine.outcomes() == {"cold": 1, "bypassed": 1}
    assert dict(engine.counts.bypasses) == {Bypass.PROMPT_LOGPROBS: 1}
    engine.turn("second", [*history, 2])
    assert engine.num_scheduled("second") == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resumable": True}, Bypass.STREAMING_INPUT),
        ({"mm_features": [TINY_IMAGE]}, Bypass.MULTIMODAL),
        ({"prompt_embeds": "anything"}, Bypass.PROMPT_EMBEDS),
        ({"prompt_token_ids": None}, Bypass.PROMPT_EMBEDS),
        ({"pooling_params": "anything"}, Bypass.POOLING),
        ({"skip_reading_prefix_cache": True}, Bypass.NO_CACHE_READ),
        (
            {
                "skip_reading_prefix_cache": True,
                "sampling_params": SimpleNamespace(prompt_logprobs=1),
            },
            Bypass.PROMPT_LOGPROBS,
        ),
        ({}, None),
    ],
    ids=str,
)
def test_reasons_to_leave_a_request_to_stock_vllm(
    change: dict[str, Any], reason: Bypass | None
) -> None:
    from vllm_stateful.adapters.engine.turn import bypass_reason

    ordinary = {
        "pooling_params": None,
        "resumable": False,
        "mm_features": [],
        "prompt_embeds": None,
        "prompt_token_ids": [1],
        "skip_reading_prefix_cache": False,
        "sampling_params": SimpleNamespace(prompt_logprobs=None),
    }
    request: Any = SimpleNamespace(**{**ordinary, **change})
    assert bypass_reason(request, caching=True) == reason
    assert bypass_reason(request, caching=False) == Bypass.PREFIX_CACHING_OFF


def test_an_unknown_operation_is_an_error_that_names_it(engine: Engine) -> None:
    with pytest.raises(ValueError, match="'list'"):
        engine.scheduler.stateful("list", {})


# ---- many sessions ---------------------------------------------------------------------------


def test_two_hundred_sessions_in_a_pool_for_twenty_are_all_answered_and_none_is_lost(
    options: dict[str, Any],
) -> None:
    engine = Engine(**{**options, "num_blocks": 121})
    histories: dict[int, list[int]] = {}
    for turn in range(2):
        for first in range(0, 200, 20):
            prompts = {
                n: [*histories.get(n, [n % 100, n // 100, *HISTORY[:18]]), turn]
                for n in range(first, first + 20)
            }
            for number, prompt in prompts.items():
                name = f"session-{number:04}"
                engine.add(f"{name}/{turn}", prompt, session_id=name, max_tokens=2)
            engine.run()
            for number, prompt in prompts.items():
                answer = engine.answer(f"session-{number:04}/{turn}")
                assert answer == expected_answer(prompt, 2)
                histories[number] = prompt + answer
            check_pool(engine.scheduler)
    assert sum(engine.outcomes().values()) == 400
    assert 1 <= engine.store.num_sessions <= 20
    assert engine.store.demotions[Demotion.BUDGET] > 300
    engine.check_nothing_is_lost()


def test_a_turn_for_each_outcome_is_counted_once_whatever_happens_to_it(engine: Engine) -> None:
    for number in range(6):
        engine.add(str(number), [number, *HISTORY], session_id=f"session-{number}", max_tokens=12)
    engine.run()
    assert sum(engine.outcomes().values()) == 6
    assert engine.outcomes() == {str(Outcome.COLD): 6}
