# SPDX-License-Identifier: Apache-2.0
"""The memory of texts against a list that is searched by brute force."""

import threading
from collections.abc import Hashable
from random import Random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_stateful.render import text_memory
from vllm_stateful.render.safe_cuts import ByteArray, Cuts
from vllm_stateful.render.text_memory import (
    BYTES_PER_CUT,
    BYTES_PER_ENTRY,
    BYTES_PER_TOKEN,
    Entry,
    Found,
    TextMemory,
)

TAIL = 3
"""What ``CONTINUED_TAIL_BYTES`` is in these tests."""
SCOPES = st.sampled_from(["a", "b", None])
TEXTS = st.binary(max_size=12).map(lambda data: bytes(byte % 3 for byte in data))


def view(text: bytes) -> ByteArray:
    return np.frombuffer(text, np.uint8)


def num_common(left: bytes, right: bytes) -> int:
    pairs = zip(left, right, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def entry(
    scope: Hashable, version: int, text: bytes, num_tokens: int = 0, num_cuts: int = 0
) -> Entry:
    cuts = Cuts(np.arange(num_cuts), np.arange(num_cuts))
    ids = tuple(range(num_tokens))
    return Entry(
        scope, version, len(text), (ids,), len(ids), cuts, {}, [], answers=[], is_spliced=False
    )


@pytest.fixture(autouse=True)
def short_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_memory, "CONTINUED_TAIL_BYTES", TAIL)


class Memories(RuleBasedStateMachine):
    """The model is a list of (text, entry), the least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = TextMemory(6 * BYTES_PER_ENTRY)
        self.model: list[tuple[bytes, Entry]] = []
        self.version = 0

    def touch(self, found: Entry) -> None:
        self.model.sort(key=lambda pair: pair[1] is found)

    def find(self, scope: Hashable, text: bytes) -> Found | None:
        found = self.memory.find(scope, view(text))
        here = [pair for pair in self.model if pair[1].scope == scope]
        longest = max((num_common(text, kept) for kept, _ in here), default=0)
        if found is None:
            assert longest == 0
            return None
        assert found.num_bytes == longest > 0
        (kept,) = [kept for kept, held in self.model if held is found.entry]
        assert found.entry.scope == scope
        assert num_common(text, kept) == longest
        assert found.is_continued == (len(kept) - longest <= TAIL)
        self.touch(found.entry)
        return found

    def keep(self, scope: Hashable, text: bytes, found: Found | None, num_tokens: int) -> None:
        self.version += 1
        made = entry(scope, self.version, text, num_tokens)
        self.memory.keep(view(text), made, found)
        if found is not None and found.is_continued:
            self.model = [pair for pair in self.model if pair[1] is not found.entry]
        if made.cost <= self.memory.max_bytes and text:
            self.model.append((text, made))
        self.drop_oldest()

    @rule(scope=SCOPES, text=TEXTS)
    def only_find(self, scope: Hashable, text: bytes) -> None:
        self.find(scope, text)

    @rule(scope=SCOPES, text=TEXTS, num_tokens=st.sampled_from([0, 5, 300, 2000]))
    def find_and_keep(self, scope: Hashable, text: bytes, num_tokens: int) -> None:
        self.keep(scope, text, self.find(scope, text), num_tokens)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), more=TEXTS, num_tokens=st.sampled_from([0, 5, 300]))
    def continue_one(self, data: st.DataObject, more: bytes, num_tokens: int) -> None:
        text, held = data.draw(st.sampled_from(self.model))
        text = text[: data.draw(st.integers(0, len(text)))] + more
        self.keep(held.scope, text, self.find(held.scope, text), num_tokens)

    @rule(scope=SCOPES, text=TEXTS, other=TEXTS)
    def keep_what_was_found_before_others_came(
        self, scope: Hashable, text: bytes, other: bytes
    ) -> None:
        """As two threads do: what was found may be gone when it is replaced."""
        found, found_too = self.find(scope, text), self.find(scope, text)
        self.keep(scope, other, found, 5)
        self.keep(scope, text, found_too, 5)

    @precondition(lambda self: self.version)
    @rule(data=st.data(), num_tokens=st.sampled_from([1, 30, 300]))
    def add_answer(self, data: st.DataObject, num_tokens: int) -> None:
        """To a prompt that may be gone by now."""
        version = data.draw(st.integers(1, self.version))
        held = [kept for _, kept in self.model if kept.version == version]
        answers = [list(kept.answers) for kept in held]
        self.memory.add_answer(version, tuple(range(num_tokens)))
        for kept, before in zip(held, answers, strict=True):
            wanted = [*before, tuple(range(num_tokens))][: text_memory.MAX_ANSWERS]
            assert kept.answers == wanted
        self.drop_oldest()

    def drop_oldest(self) -> None:
        while sum(held.cost for _, held in self.model) > self.memory.max_bytes:
            self.model.pop(0)

    @rule()
    def clear(self) -> None:
        self.memory.clear()
        self.model = []

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        assert [id(held) for held in self.memory._entries.values()] == [
            id(held) for _, held in self.model
        ]
        assert len(self.memory) == len(self.model)
        assert self.memory.num_bytes == sum(held.cost for _, held in self.model)
        assert self.memory.num_bytes <= self.memory.max_bytes
        assert set(self.memory._indexes) == {held.scope for _, held in self.model}
        for scope, index in self.memory._indexes.items():
            held = [id(held) for _, held in self.model if held.scope == scope]
            assert sorted(map(id, index.values())) == sorted(held)


TestMemories = Memories.TestCase
TestMemories.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_cost_counts_text_tokens_and_cuts() -> None:
    made = entry("a", 1, b"x" * 100, num_tokens=40, num_cuts=3)
    assert made.cost == 100 + 40 * BYTES_PER_TOKEN + 3 * BYTES_PER_CUT + BYTES_PER_ENTRY


def test_the_least_recently_found_goes_first() -> None:
    memory = TextMemory(2 * entry("a", 0, b"xxxx").cost)
    memory.keep(view(b"1111"), entry("a", 1, b"1111"), None)
    memory.keep(view(b"2222"), entry("b", 2, b"2222"), None)
    assert memory.find("a", view(b"1")) is not None
    memory.keep(view(b"3333"), entry("c", 3, b"3333"), None)
    assert memory.find("b", view(b"2222")) is None
    assert memory.find("a", view(b"1111")) is not None


def test_a_continued_text_is_replaced_and_a_sibling_is_not() -> None:
    memory = TextMemory(1 << 20)
    memory.keep(view(b"system" + b"x" * TAIL), entry("a", 1, b"system" + b"x" * TAIL), None)
    found = memory.find("a", view(b"system user"))
    assert found is not None
    assert found.is_continued
    memory.keep(view(b"system user asks"), entry("a", 2, b"system user asks"), found)
    assert len(memory) == 1
    found = memory.find("a", view(b"system bot"))
    assert found is not None
    assert found.entry.version == 2
    assert not found.is_continued
    memory.keep(view(b"system bot"), entry("a", 3, b"system bot"), found)
    assert len(memory) == 2


def test_a_text_that_costs_more_than_everything_is_not_kept_but_replaces() -> None:
    memory = TextMemory(BYTES_PER_ENTRY + 10)
    memory.keep(view(b"short"), entry("a", 1, b"short"), None)
    found = memory.find("a", view(b"short and long"))
    memory.keep(view(b"short and long"), entry("a", 2, b"short and long"), found)
    assert len(memory) == memory.num_bytes == 0
    assert memory.find("a", view(b"short")) is None


def test_the_text_is_copied() -> None:
    memory = TextMemory(1 << 20)
    data = np.frombuffer(bytearray(b"abcdef"), np.uint8).copy()
    memory.keep(data, entry("a", 1, b"abcdef"), None)
    data[:] = 0
    found = memory.find("a", view(b"abcdef"))
    assert found is not None
    assert found.num_bytes == 6


def test_an_empty_text_is_neither_found_nor_kept() -> None:
    memory = TextMemory(1 << 20)
    memory.keep(view(b""), entry("a", 1, b""), None)
    assert len(memory) == 0
    memory.keep(view(b"x"), entry("a", 2, b"x"), None)
    assert memory.find("a", view(b"")) is None


def test_four_threads() -> None:
    memory = TextMemory(20 * BYTES_PER_ENTRY)
    failures: list[str] = []

    def work(seed: int) -> None:
        random = Random(seed)
        try:
            for step in range(1500):
                text = bytes(random.choice(b"ab") for _ in range(random.randint(1, 14)))
                scope = random.choice("xy")
                found = memory.find(scope, view(text))
                if found is not None and found.entry.scope != scope:
                    failures.append("another scope")
                made = entry(scope, seed * 10_000 + step, text, random.randint(0, 200))
                memory.keep(view(text), made, found)
                if memory.num_bytes < 0 or step % 500 == 499:
                    memory.clear()
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    held = list(memory._entries.values())
    assert memory.num_bytes == sum(made.cost for made in held) <= memory.max_bytes
    assert sum(len(index) for index in memory._indexes.values()) == len(held)
