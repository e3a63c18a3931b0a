# SPDX-License-Identifier: Apache-2.0
"""Conversations over one engine core, in any order of events: the machine that hypothesis plays.

The model is simple: a list of tokens per session, and "the answer to a prompt is a function of
the prompt". Against it runs vLLM's real scheduler with the plugin (synchronous and asynchronous)
over a worker that checks every KV slot it reads; ``free + used + pinned == total`` is checked in
every step, and at the end no block may be lost.
"""

import itertools
from typing import NamedTuple

import hypothesis.strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)
from simulated_connectors import connected
from simulated_engine import SimulatedEngine, expected_answer
from simulated_lmcache import stand_in
from vllm.config import KVTransferConfig
from vllm.v1.request import RequestStatus

from vllm_stateful.adapters.engine.connectors import parts_of
from vllm_stateful.adapters.engine.invariants import check_pool

stand_in()

NUM_BLOCKS = 40
MAX_PROMPT = 80
TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=30)
SESSION_IDS = st.sampled_from([None, "session-one", "session-two", "session-three"])
SALTS = st.sampled_from([None, None, "tenant-a"])


class Conversation(NamedTuple):
    """What a client knows: its session id, if it sends one, and the history so far."""

    session_id: str | None
    salt: str | None
    tokens: list[int]


class AgentSessions(RuleBasedStateMachine):
    """Conversations over one engine core, in a pool that holds about two of them."""

    async_scheduling = False
    num_drafts = 0
    connectors: tuple[KVTransferConfig, ...] = ()
    num_blocks = NUM_BLOCKS
    session_drafts = False
    beside_head = False
    kinds: tuple[str, ...] = ("full",)
    has_markers = False
    stops: tuple[int, ...] = ()
    block_size = 4
    conversations = Bundle("conversations")

    @initialize()
    def start(self) -> None:
        self.now = 0.0
        self.engine = SimulatedEngine(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_num_seqs=4,
            max_batched=32,
            async_scheduling=self.async_scheduling,
            num_drafts=self.num_drafts,
            session_drafts=self.session_drafts,
            beside_head=self.beside_head,
            kinds=self.kinds,
            has_markers=self.has_markers,
            ends=self.stops,
            kv_transfer=connected(self.connectors),
        )
        assert self.engine.scheduler.stateful_off is None
        # vLLM's own hits may join blocks of two requests whose tokens behind were not the same.
        self.engine.worker.are_heads_read = False
        self.manager = self.engine.manager
        self.manager.store._clock = lambda: self.now
        self.ids = (f"request-{n}" for n in itertools.count())
        self.running: dict[str, tuple[list[int], int]] = {}

    def send(self, said: Conversation, new: list[int], max_tokens: int) -> Conversation:
        """Start a turn; returns the conversation as it will be when the turn has ended."""
        prompt = (said.tokens + new)[-MAX_PROMPT:]
        request_id = next(self.ids)
        self.engine.add(
            request_id,
            prompt,
            session_id=said.session_id,
            max_tokens=max_tokens,
            cache_salt=said.salt,
            stop_token_ids=list(self.stops),
        )
        self.running[request_id] = (prompt, max_tokens)
        return said._replace(tokens=prompt + self.expected(prompt, max_tokens))

    def expected(self, prompt: list[int], max_tokens: int) -> list[int]:
        """What a stateless engine answers, up to a stop."""
        answer = expected_answer(prompt, max_tokens)
        ends = [place for place, token in enumerate(answer, 1) if token in self.stops]
        return answer[: min(ends, default=len(answer))]

    @rule(
        target=conversations,
        session_id=SESSION_IDS,
        salt=SALTS,
        tokens=st.lists(st.integers(0, 99), min_size=10, max_size=40),
    )
    def first_turn(
        self, session_id: str | None, salt: str | None, tokens: list[int]
    ) -> Conversation:
        said = self.send(Conversation(session_id, salt, []), tokens, 3)
        self.finish_all()
        return said

    @rule(
        target=conversations,
        said=consumes(conversations),
        new=TOKENS,
        max_tokens=st.integers(1, 6),
        wait=st.booleans(),
    )
    def turn(self, said: Conversation, new: list[int], max_tokens: int, wait: bool) -> Conversation:
        said = self.send(said, new, max_tokens)
        if wait:
            self.finish_all()
        return said

    @rule(target=conversations, said=conversations, new=TOKENS, session_id=SESSION_IDS)
    def fork(self, said: Conversation, new: list[int], session_id: str | None) -> Conversation:
        """A sub-agent starts on its parent's history; the parent goes on as well."""
        return self.send(said._replace(session_id=session_id), new, 2)

    @rule(target=conversations, said=conversations, extra=st.integers(1, 20))
    def burst(self, said: Conversation, extra: int):  # type: ignore[no-untyped-def]
        """Three parallel turns on one history, long enough to need preemption."""
        return multiple(*(self.send(said, [n] * extra, 16) for n in range(3)))

    @rule(target=conversations, said=conversations, at=st.integers(0, 60), token=st.integers(0, 99))
    def edit(self, said: Conversation, at: int, token: int) -> Conversation:
        """An edited history: from the changed token on nothing may be reused."""
        at = min(at, len(said.tokens) - 1)
        edited = [*said.tokens[:at], token, *said.tokens[at + 1 :]]
        return self.send(said._replace(tokens=edited), [7], 2)

    @rule(target=conversations, said=consumes(conversations), keep=st.integers(1, 60))
    def truncate(self, said: Conversation, keep: int) -> Conversation:
        """Compaction, or a retry: the prompt ends inside what is resident."""
        return self.send(said._replace(tokens=said.tokens[:keep]), [], 2)

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
        self.collect()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.running:
            request_id = data.draw(st.sampled_from(sorted(self.running)))
            self.engine.abort(request_id)
            del self.running[request_id]

    @rule(data=st.data())
    def abort_behind_a_schedule(self, data: st.DataObject) -> None:
        """vLLM aborts while it waits for a step, with the next one scheduled already."""
        if not self.running or not self.engine.in_flight:
            return
        self.engine.schedule()
        self.abort(data)
        self.engine.update()

    @rule(session_id=SESSION_IDS, salt=SALTS)
    def close(self, session_id: str | None, salt: str | None) -> None:
        self.engine.scheduler.stateful(
            "close", {"session_ids": [session_id or "nobody-knows"], "cache_salt": salt}
        )

    @rule(running_too=st.booleans())
    def reset_prefix_cache(self, running_too: bool) -> None:
        connector = self.engine.scheduler.connector
        parts = () if connector is None else parts_of(connector)
        tiers = [getattr(part, "connector_scheduler", None) for part in parts]
        loading = any(
            request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            for request in self.engine.scheduler.requests.values()
        ) or any(not job.is_store for tier in tiers if tier for job in tier._jobs.values())
        flushing = any(tier is not None and tier._current_batch_jobs_to_flush for tier in tiers)
        if running_too and not self.engine.in_flight and not loading and not flushing:
            # vLLM 0.32 fails in the next step when running requests start again and the offload
            # tier still has their KV; while one is loaded, it refuses; and a second reset before
            # the next step ends the engine where the first has stores to wait for.
            assert self.engine.scheduler.reset_prefix_cache(
                reset_running_requests=True, reset_connector=bool(self.connectors)
            )
        else:
            self.engine.scheduler.reset_prefix_cache()
        assert not any(r.is_idle for r in self.manager.store.residencies())

    @rule(seconds=st.sampled_from([1.0, 500.0, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    def finish_all(self) -> None:
        self.engine.run()
        self.collect()

    def collect(self) -> None:
        """Every answer is the one that a stateless engine would give."""
        for request_id, (prompt, max_tokens) in list(self.running.items()):
            if self.engine.finished[request_id].is_finished():
                assert self.engine.answer(request_id) == self.expected(prompt, max_tokens)
                del self.running[request_id]

    @invariant()
    def pool_is_consistent(self) -> None:
        if hasattr(self, "engine"):
            check_pool(self.engine.scheduler)
            pins = self.manager.store.pins
            assert pins.num_pinned <= pins.budget_blocks

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.finish_all()
        assert not self.running
        for resident in self.manager.store.residencies():
            self.manager.store.close(resident.session)
        counts = check_pool(self.engine.scheduler)
        assert counts["free"] == counts["total"] == self.num_blocks - 1
