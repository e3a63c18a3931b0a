# SPDX-License-Identifier: Apache-2.0
"""Turns over models with several KV cache groups: windows, chunks and states."""

import random

import pytest
from recorded_engine import ALICE, BOB, Engine
from simulated_engine import VOCAB, SimulatedEngine, expected_answer
from simulated_groups import MARKERS

from vllm_stateful.adapters.engine.invariants import check_pool
from vllm_stateful.prefix import matching, resume_places
from vllm_stateful.types import Demotion

KINDS = [
    ("window", "full"),
    ("full", "window", "window"),
    ("chunk", "full"),
    ("state", "full"),
    ("state", "state", "state", "full"),
    ("state", "window", "full"),
    ("state",),
    ("window",),
    ("window*2", "full"),
    ("window", "full*2"),
    ("state*2", "full*2"),
    ("head", "full"),
    ("head", "window", "full"),
]
ENDED = 4
"""Tokens of an answer."""


@pytest.fixture(params=KINDS, ids="-".join)
def kinds(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def engine(request: pytest.FixtureRequest, kinds: tuple[str, ...]) -> Engine:
    return Engine(num_blocks=200, kinds=kinds, async_scheduling=request.param)


@pytest.fixture(autouse=True)
def _short_prefixes_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_places, "MIN_SAVED", 4)


@pytest.mark.parametrize("length", [21, 22, 23, 24])
def test_an_appended_turn_computes_what_is_new_and_one_token(engine: Engine, length: int) -> None:
    history = engine.turn("first", list(range(length)), max_tokens=ENDED)
    for number in range(4):
        history = engine.turn(f"turn-{number}", [*history, 7, 8, number], max_tokens=ENDED)
        assert engine.num_scheduled(f"turn-{number}") == 3 + 1 + ENDED - 1
        # For the point at the prompt's end, and as many of vLLM's own for parts of a block.
        assert engine.num_copies <= 2 * engine_states(engine)
        check_pool(engine.scheduler)
    assert engine.outcomes() == {"cold": 1, "resumed": 4}
    engine.check_nothing_is_lost()


def engine_states(engine: Engine) -> int:
    return sum(kind == "state" for kind in engine.worker.kinds)


@pytest.mark.parametrize("length", [21, 24])
def test_a_changed_answer_costs_no_more_than_itself(engine: Engine, length: int) -> None:
    """As when a template strips reasoning: the history parts where the answer begins."""
    history = list(range(length))
    engine.turn("first", history, max_tokens=ENDED)
    for number in range(4):
        history = [*history, 55, 56, number]
        prompt_tokens = len(history)
        engine.turn(f"turn-{number}", history, max_tokens=ENDED)
        new = 3 + ("head" in engine.worker.kinds)  # whose token behind must be the same
        assert engine.num_scheduled(f"turn-{number}") <= new + ENDED - 1, prompt_tokens
    assert len(engine.branches(ALICE)) <= 4
    engine.check_nothing_is_lost()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_an_answer_written_anew_behind_a_marker_goes_on_there(
    kinds: tuple[str, ...], is_async: bool
) -> None:
    """As when a template re-serializes a call: what is before the call is not computed again."""
    engine = Engine(num_blocks=900, kinds=kinds, async_scheduling=is_async, has_markers=True)
    num_taken = 0
    for number in range(12):
        name = f"session-{number:03}"
        prompt = [number, *range(1, 21)]
        history = engine.turn(f"first-{number}", prompt, name, max_tokens=24)
        check_pool(engine.scheduler)
        inside = [each for each in range(21 + 4, 43) if history[each] >= VOCAB - len(MARKERS)]
        if not inside:
            continue
        num_taken += 1
        kept = inside[0] + 2  # the marker, and a token behind it
        changed = [*history[:kept], (history[kept] + 1) % 90, *range(30, 36)]
        engine.turn(f"second-{number}", changed, name, max_tokens=ENDED)
        assert engine.num_scheduled(f"second-{number}") <= len(changed) - inside[0] + ENDED - 1
        check_pool(engine.scheduler)
    assert num_taken > 3
    engine.check_nothing_is_lost()


def test_a_fork_leaves_its_parent_where_it_was(engine: Engine) -> None:
    history = engine.turn("first", list(range(22)), max_tokens=ENDED)
    for name in (BOB, "session-carol"):
        engine.turn(name, [*history, 40, 41], name, max_tokens=ENDED)
        assert engine.num_scheduled(name) <= 2 + 1 + ENDED - 1
    engine.turn("second", [*history, 50], max_tokens=ENDED)
    assert engine.num_scheduled("second") == 1 + 1 + ENDED - 1
    engine.check_nothing_is_lost()


def test_a_state_that_a_fork_holds_is_not_overwritten(engine: Engine) -> None:
    """Both go on from one point. Who comes first must leave it to the other, and to a third."""
    history = engine.turn("first", list(range(22)), max_tokens=ENDED)
    engine.turn("fork", [*history, 40, 41], BOB, max_tokens=ENDED)
    engine.turn("second", [*history, 50, 51, 52, 53], max_tokens=ENDED)
    engine.turn("third", [*history, 60], "session-carol", max_tokens=ENDED)
    assert engine.num_scheduled("third") == 1 + 1 + ENDED - 1
    engine.check_nothing_is_lost()


def test_a_fork_near_the_beginning_does_not_see_its_parent_grow(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the whole block table is held, so both would have the very same list."""
    monkeypatch.setattr(matching, "MIN_SHARED_TOKENS", 2)
    history = engine.turn("first", [1, 2], max_tokens=3)
    engine.turn("fork", [*history, 40, 41], BOB, max_tokens=ENDED)
    history = engine.turn("second", [*history, *range(50, 60)], max_tokens=ENDED)
    check_pool(engine.scheduler)
    engine.turn("third", [*history, 70], max_tokens=ENDED)
    check_pool(engine.scheduler)
    engine.check_nothing_is_lost()


def test_where_two_prompts_part_the_third_starts(engine: Engine) -> None:
    """A fork where no resume point is: the second pays, and leaves one for the others.

    It does not where vLLM's own cache has whole blocks up to little before that place.
    """
    shared = list(range(30))
    engine.turn("first", [*shared, *range(50, 60)])
    engine.turn("second", [*shared, *range(60, 70)], BOB)
    engine.turn("third", [*shared, *range(70, 80)], "session-carol")
    assert engine.num_scheduled("third") in (10, 11, 10 + 30 % engine.block_size)
    engine.check_nothing_is_lost()


def test_running_turns_give_up_their_points_before_anybody_is_refused(
    kinds: tuple[str, ...],
) -> None:
    """A cache for one long turn and no more: it ends, as it does in stock vLLM."""
    needed = sum(30 if kind[:4] in ("full", "head") else 5 for kind in kinds)
    engine = Engine(num_blocks=needed + 20, kinds=kinds)
    history = engine.turn("first", list(range(40)), max_tokens=ENDED)
    history = engine.turn("second", [*history, *range(30)], max_tokens=ENDED)
    engine.turn("third", [*history, *range(20)], max_tokens=16)
    engine.check_nothing_is_lost()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_many_sessions_on_a_cache_for_few(is_async: bool) -> None:
    """200 sessions with states on a cache for about 20: none is stuck, no block is lost."""
    draw = random.Random(0)
    kinds = ("state", "state", "full")
    engine = Engine(num_blocks=20 * 18, kinds=kinds, async_scheduling=is_async, max_num_seqs=8)
    histories = {f"session-{number:03}": list(range(30)) for number in range(200)}
    for number in range(600):
        name = draw.choice(list(histories))
        prompt = [*histories[name], number % 100, *draw.choices(range(100), k=5)][-60:]
        engine.add(f"turn-{number}", prompt, session_id=name, max_tokens=3)
        histories[name] = prompt + expected_answer(prompt, 3)
        if number % 4 == 3:
            engine.run()
            check_pool(engine.scheduler)
    engine.run()
    assert len(engine.finished) == 600
    assert all(request.is_finished() for request in engine.finished.values())
    assert engine.demotions()["budget"] + engine.demotions().get("pressure", 0) > 100
    engine.check_nothing_is_lost()


@pytest.mark.parametrize("kinds", [("full", "window*2"), ("full", "full*2", "window*2")])
@pytest.mark.parametrize("retention", [None, 0])
@pytest.mark.parametrize("length", [20, 22, 24])
def test_a_shorter_history_goes_on_where_blocks_are_hashed(
    kinds: tuple[str, ...], retention: int | None, length: int
) -> None:
    """Groups with blocks of two sizes: the smaller ones behind it were full once, and hashed."""
    engine = Engine(num_blocks=100, kinds=kinds, retention=retention)
    prompt = list(range(length))
    engine.turn("first", prompt, max_tokens=12)
    (kept,) = engine.branches(ALICE)
    engine.store._cut_back(kept, length, Demotion.PRESSURE)
    assert kept.frontier == length
    engine.turn("second", [*prompt, *range(50, 57)], max_tokens=6)
    assert engine.num_scheduled("second") == 7 + 6 - 1
    engine.check_nothing_is_lost()


@pytest.mark.parametrize("num_waits", [1, 2, 3])
def test_a_fork_that_has_to_wait_keeps_its_hit(num_waits: int) -> None:
    """Refused while others run, it is admitted later with all that its parent has."""
    engine = Engine(num_blocks=88, kinds=("state", "full"))
    history = engine.turn("parent", list(range(43)), max_tokens=ENDED)
    engine.outputs.clear()
    for number in range(3):
        engine.add(f"other-{number}", [99 - number] * 74, session_id=f"session-{number}-other")
    for _ in range(6):
        engine.step()
    engine.add("fork", [*history, 50, 51, *[77] * 60], session_id=BOB, max_tokens=2)
    for _ in range(num_waits):
        engine.step()
    for number in range(3):
        engine.scheduler.stateful(
            "close", {"session_ids": [f"session-{number}-other"], "cache_salt": None}
        )
        engine.abort(f"other-{number}")
    engine.run()
    assert engine.num_scheduled("fork") == 2 + 60 + 1 + 1


def beside_drafts(ends: tuple[int, ...] = ()) -> SimulatedEngine:
    """States beside drafts of the worker's own, as with MTP on CUDA."""
    return SimulatedEngine(
        num_blocks=200,
        block_size=16,
        async_scheduling=True,
        num_drafts=3,
        kinds=("full", "state"),
        ends=ends,
    )


@pytest.mark.parametrize("num_unprocessed", [1, 2])
@pytest.mark.parametrize("length", range(5, 16))
def test_an_abort_beside_drafts_leaves_no_wrong_state(length: int, num_unprocessed: int) -> None:
    """vLLM aborts while it waits for a step, and may have scheduled the next one by then."""
    for num_steps in range(8):
        engine = beside_drafts()
        request = engine.add("first", list(range(length)), session_id="session", max_tokens=40)
        for _ in range(num_steps):
            engine.step()
        if num_unprocessed == 2:
            engine.schedule()
        engine.abort("first")
        engine.run()
        history = [*request.all_token_ids, 50, 51]
        engine.add("second", history, session_id="session", max_tokens=2)
        engine.run()
        assert engine.answer("second") == expected_answer(history, 2)


@pytest.mark.parametrize("length", range(20, 36))
def test_a_turn_beside_drafts_goes_on_behind_the_stop(length: int) -> None:
    prompt = list(range(length))
    answer = expected_answer(prompt, 30)
    stop = answer[11]
    answer = answer[: answer.index(stop) + 1]
    engine = beside_drafts(ends=(stop,))
    engine.add("first", prompt, session_id="session", max_tokens=40, stop_token_ids=[stop])
    engine.run()
    assert engine.answer("first") == answer
    history = [*prompt, *answer, 50, 51]
    engine.add("second", history, session_id="session", max_tokens=1)
    output = engine.scheduler.schedule()
    (new,) = output.scheduled_new_reqs
    known = length + len(answer)
    if (known - 1) // 16 == (known + 3) // 16:  # no step could have crossed the end of a block
        assert new.num_computed_tokens == known
    else:
        assert new.num_computed_tokens <= known
