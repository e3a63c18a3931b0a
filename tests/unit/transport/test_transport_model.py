# SPDX-License-Identifier: Apache-2.0
"""Hypothesis: several API processes and engine cores, evictions, restarts and misses.

The naive model of a prompt that travels as a delta is the prompt itself: what an engine puts
together is that, or the engine says that it has no base and is sent all of it.
"""

from collections import deque
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from vllm_stateful.transport import sent_versions
from vllm_stateful.transport.bases import BYTES_PER_HASH, BYTES_PER_TOKEN, Base, BaseStore
from vllm_stateful.transport.header import BaseMissError, ChecksumError, checksum
from vllm_stateful.transport.prompt_ids import PromptTokenIds
from vllm_stateful.transport.sent_versions import Parcel, SentVersions

ENGINES = st.integers(0, 1)
PLACES = st.integers(0, 1)
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=6)
MAX_BYTES = 30 * BYTES_PER_TOKEN + 3 * BYTES_PER_HASH


def num_shared(left: list[int], right: list[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


class Message(NamedTuple):
    sender: "Client"
    parcel: Parcel
    prompt: PromptTokenIds


class Client:
    """One API process, and the prompts that its renderer may continue."""

    def __init__(self, name: str) -> None:
        self.sent = SentVersions(name)
        self.num_versions = 0
        self.prompts: list[PromptTokenIds] = []
        self.make([0], None, False)

    def make(self, ids: list[int], parent: PromptTokenIds | None, ends: bool) -> PromptTokenIds:
        """A prompt that says truthfully what it shares with its parent."""
        self.num_versions += 1
        made = PromptTokenIds(
            ids,
            version=self.num_versions,
            parent=0 if parent is None else parent.version,
            num_parent_tokens=0 if parent is None else num_shared(parent, ids),
            parent_ends=parent is not None and ends,
        )
        self.prompts.append(made)
        return made

    def pack(self, engine: int, prompt: PromptTokenIds) -> Message:
        parcel = self.sent.pack(engine, prompt)
        whole = checksum(np.array(prompt, np.int32))
        return Message(self, parcel._replace(header=parcel.header._replace(checksum=whole)), prompt)


class Transport(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.num_clients = 0
        self.stores = [BaseStore(MAX_BYTES, vocab_size=4) for _ in range(2)]
        self.clients = [self.new_client() for _ in range(2)]
        self.wires: dict[tuple[int, int], deque[Message]] = {
            (place, engine): deque() for place in range(2) for engine in range(2)
        }
        for wire in self.wires:
            self.send(*wire, self.clients[wire[0]].prompts[0])
        self.misses: deque[tuple[int, int, Message]] = deque()

    def new_client(self) -> Client:
        self.num_clients += 1
        return Client(f"client-{self.num_clients}")

    # ---- the API processes

    def send(self, place: int, engine: int, prompt: PromptTokenIds, arrives: bool = False) -> None:
        self.wires[place, engine].append(self.clients[place].pack(engine, prompt))
        while arrives and self.wires[place, engine]:
            self.receive(place, engine, 0)

    @rule(place=PLACES, engine=ENGINES, data=st.data(), new=TOKENS, arrives=st.booleans())
    def extend_edit_or_fork(
        self, data: st.DataObject, place: int, engine: int, new: list[int], arrives: bool
    ) -> None:
        """Keep any part of any earlier prompt; the last is the one that usually goes on."""
        client = self.clients[place]
        parent = data.draw(st.just(client.prompts[-1]) | st.sampled_from(client.prompts))
        kept = data.draw(st.just(len(parent)) | st.integers(0, len(parent)))
        made = client.make([*parent[:kept][:20], *new], parent, data.draw(st.booleans()))
        self.send(place, engine, made, arrives)

    @rule(place=PLACES, engine=ENGINES, data=st.data(), is_same=st.booleans())
    def repeat(self, data: st.DataObject, place: int, engine: int, is_same: bool) -> None:
        """Several answers to one prompt, or the same text rendered once more."""
        client = self.clients[place]
        prompt = data.draw(st.sampled_from(client.prompts))
        self.send(place, engine, prompt if is_same else client.make(list(prompt), prompt, False))

    @precondition(lambda self: self.misses)
    @rule()
    def resend(self) -> None:
        place, engine, missed = self.misses.popleft()
        if self.clients[place] is not missed.sender:
            return  # restarted meanwhile
        missed.sender.sent.forget(engine, missed.prompt)
        self.send(place, engine, missed.prompt)
        message = self.wires[place, engine][-1]
        assert not message.parcel.is_delta
        assert message.parcel.token_ids == missed.prompt

    @rule(place=PLACES)
    def restart_client(self, place: int) -> None:
        """What it sent is still on its way."""
        self.clients[place] = self.new_client()

    # ---- the engine cores

    @precondition(lambda self: any(self.wires.values()))
    @rule(data=st.data(), num_messages=st.integers(1, 6), num_hashes=st.integers(0, 1))
    def deliver(self, data: st.DataObject, num_messages: int, num_hashes: int) -> None:
        """In order on one wire, in any order across them."""
        wire = data.draw(st.sampled_from([name for name, queue in self.wires.items() if queue]))
        for _ in range(min(num_messages, len(self.wires[wire]))):
            self.receive(*wire, num_hashes)

    def receive(self, place: int, engine: int, num_hashes: int) -> None:
        store = self.stores[engine]
        message = self.wires[place, engine].popleft()
        header, token_ids = message.parcel
        try:
            made = store.rebuild(header, token_ids)
        except BaseMissError:
            assert message.parcel.is_delta
            self.misses.append((place, engine, message))
            return
        assert made.token_ids == message.prompt
        assert made.array.tolist() == message.prompt
        shared = made.num_parent_tokens
        assert (
            made.parent is None or list(made.parent.token_ids[:shared]) == message.prompt[:shared]
        )
        hashes = ("hash",) * num_hashes
        store.keep(header, Base(tuple(made.token_ids), made.array, None, hashes))

    @rule(place=PLACES, engine=ENGINES, token=st.integers(0, 3))
    def garble(self, place: int, engine: int, token: int) -> None:
        """A message that was changed on its way is noticed, and not remembered."""
        wire, store = self.wires[place, engine], self.stores[engine]
        if not wire:
            return
        header, token_ids = wire[0].parcel
        before = len(store), store.num_bytes
        with pytest.raises((ChecksumError, BaseMissError)) as caught:
            store.rebuild(header, [*token_ids, token])
        assert caught.type is ChecksumError or wire[0].parcel.is_delta
        assert (len(store), store.num_bytes) == before

    @rule(engine=ENGINES, restarts=st.booleans())
    def lose_all(self, engine: int, restarts: bool) -> None:
        if restarts:
            self.stores[engine] = BaseStore(MAX_BYTES, vocab_size=4)
        else:
            self.stores[engine].clear()

    # ---- always

    @invariant()
    def bytes_are_counted_and_bounded(self) -> None:
        for store in self.stores:
            assert store.num_bytes == sum(base.cost for base in store._bases.values())
            assert store.num_bytes <= MAX_BYTES
            assert set(store._parents) <= set(store._bases)

    @invariant()
    def versions_are_bounded(self) -> None:
        for client in self.clients:
            for versions in client.sent._sent.values():
                assert len(versions) <= sent_versions.MAX_VERSIONS

    def teardown(self) -> None:
        """In the end every prompt arrives."""
        while any(self.wires.values()) or self.misses:
            for (place, engine), wire in self.wires.items():
                while wire:
                    self.receive(place, engine, 0)
            if self.misses:
                self.resend()


@pytest.mark.parametrize("max_versions", [2, 1000])
def test_an_engine_rebuilds_the_prompt_that_was_meant_or_asks_for_all_of_it(
    monkeypatch: pytest.MonkeyPatch, max_versions: int
) -> None:
    monkeypatch.setattr(sent_versions, "MIN_SAVED_TOKENS", 1)
    monkeypatch.setattr(sent_versions, "MAX_VERSIONS", max_versions)
    run_state_machine_as_test(
        Transport,
        settings=settings(max_examples=120, stateful_step_count=50, deadline=None),
    )
