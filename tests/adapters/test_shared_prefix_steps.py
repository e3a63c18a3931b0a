# SPDX-License-Identifier: Apache-2.0
"""Who shares a prefix in the scheduler's steps, seen from a worker that knows every slot."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from simulated_engine import SimulatedEngine, expected_answer

from vllm_stateful.adapters import attention_choice
from vllm_stateful.adapters.engine.shared_prefixes import SchedulerPrefixes
from vllm_stateful.adapters.slots import of_step
from vllm_stateful.attention import shared_prefixes
from vllm_stateful.attention.shared_prefixes import SharedKeys
from vllm_stateful.config import StatefulConfig

BLOCK = 16


@pytest.fixture(autouse=True)
def _share_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefixes, "MIN_KEYS", 2 * BLOCK)


class Engine(SimulatedEngine):
    """Checks what each step says, when its worker has taken the step's changes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(block_size=BLOCK, **options)
        self.scheduler.prefixes = SchedulerPrefixes(self.manager)
        self.shared: list[dict[frozenset[str], int]] = []
        update = self.worker._update

        def checked(step: Any) -> None:
            update(step)
            self.check(step)

        self.worker._update = checked

    def check(self, step: Any) -> None:
        found = of_step(step).shared
        names = [name for each in found for name in each.names]
        assert len(set(names)) == len(names)
        for each in found:
            members = [self.worker.requests[name] for name in each.names]
            assert len(members) > 1
            assert min(member.num_computed for member in members) >= each.num_keys
            runs = {tuple(member.tables[0][: each.num_keys // BLOCK]) for member in members}
            assert len(runs) == 1
            assert each.num_keys % BLOCK == 0
            assert each.num_keys >= 2 * BLOCK
        self.shared.append({frozenset(each.names): each.num_keys for each in found})


def text(random: Random, num_tokens: int) -> list[int]:
    return [random.randrange(100) for _ in range(num_tokens)]


def test_agents_of_one_parent_share_its_prompt_when_theirs_is_computed() -> None:
    random, engine = Random(0), Engine(num_blocks=64)
    parent = text(random, 5 * BLOCK)
    engine.add("parent", parent, max_tokens=12)
    engine.step()
    for name in "ab":
        engine.add(name, parent + text(random, 40), max_tokens=6)
    engine.run()
    assert engine.shared[0] == {}
    assert {frozenset(["a", "b", "parent"]): 80} in engine.shared
    assert engine.shared[-1] == {}  # one is left


@pytest.mark.parametrize(("num_drafts", "is_async"), [(0, False), (0, True), (3, False)])
@pytest.mark.parametrize("seed", range(6))
def test_random_steps(seed: int, num_drafts: int, is_async: bool) -> None:
    """A pool that is too small for all, so that some are preempted; turns come back."""
    random = Random(seed)
    engine = Engine(
        num_blocks=random.choice((26, 40, 80)),
        num_drafts=num_drafts,
        async_scheduling=is_async,
        max_batched=random.choice((24, 64)),
    )
    texts = [text(random, 3 * BLOCK)]
    prompts = {}
    for number in range(24):
        begin = random.choice(texts)
        begin = begin[: random.randrange(BLOCK, len(begin) + 1)]
        prompt = (begin + text(random, random.randrange(1, 40)))[: 14 * BLOCK]
        texts.append(prompt)
        prompts[f"r{number}"] = prompt
        session = f"s{number % 5}"
        engine.add(f"r{number}", prompt, session_id=session, max_tokens=random.randrange(2, 30))
        for _ in range(random.randrange(4)):
            engine.step()
    engine.run()
    for name, prompt in prompts.items():
        assert engine.answer(name) == expected_answer(prompt, len(engine.answer(name)))
    assert any(engine.shared)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_request_that_comes_back_is_looked_up_again(is_resumed: bool) -> None:
    """With as many blocks as before, but others: a name that is used again, or a preemption."""

    def blocks(*ids: int) -> list[Any]:
        return [SimpleNamespace(block_id=each) for each in ids]

    tables = {"a": blocks(1, 2, 3), "b": blocks(1, 2, 4)}
    group = SimpleNamespace(req_to_blocks=tables, block_size=BLOCK)
    coordinator = SimpleNamespace(single_type_managers=[group])
    prefixes = SchedulerPrefixes(SimpleNamespace(coordinator=coordinator))  # type: ignore[arg-type]
    request = SimpleNamespace(num_prompt_tokens=40, num_computed_tokens=41)
    requests: Any = {"a": request, "b": request}

    def step(*moved: str) -> Any:
        new = [SimpleNamespace(req_id=name) for name in moved if not is_resumed]
        cached = SimpleNamespace(resumed_req_ids=set(moved) if is_resumed else set())
        made: Any = SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={"a": 2, "b": 2},
        )
        prefixes.step_begins(made, requests)
        return of_step(made).shared

    expected = (SharedKeys(("a", "b"), 32),)
    assert step("a", "b") == expected
    assert step() == expected
    tables["a"] = blocks(7, 2, 3)
    assert step("a") == ()
    tables["a"] = blocks(1, 2, 3)
    assert step("a") == expected
    tables["a"] = blocks(7, 2, 3, 5)
    assert step("a") == ()
    tables |= {"a": blocks(1, 2, 3, 4), "b": blocks(1, 2, 3, 4)}
    request.num_computed_tokens = 66
    assert step("a", "b") == expected, "answers may yet be taken back: they count for nothing"


@pytest.mark.parametrize(
    ("change", "is_wanted"),
    [
        ({}, True),
        ({"disable": frozenset({"shared-prefixes"})}, False),
        ({"v2": False}, False),
        ({"path": "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"}, False),
    ],
)
def test_only_where_a_worker_can_use_it(
    change: dict[str, Any], is_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = change.pop("path", attention_choice.ON_CUDA.backend)
    stock = SimpleNamespace(get_path=lambda: path)
    monkeypatch.setattr(attention_choice, "ON_CUDA", attention_choice.ON_CUDA._replace(stock=stock))
    scheduler = Engine(num_blocks=8).scheduler
    scheduler.vllm_config = SimpleNamespace(use_v2_model_runner=change.pop("v2", True))
    scheduler.config = StatefulConfig(**change)
    assert scheduler._are_prefixes_shared() == is_wanted
