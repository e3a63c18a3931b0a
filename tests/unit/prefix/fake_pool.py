# SPDX-License-Identifier: Apache-2.0
"""A pool of counted blocks, and turns that treat a ``ResidencyStore`` as the adapter does."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_stateful.prefix.boundaries import BoundaryRules
from vllm_stateful.prefix.groups import Table
from vllm_stateful.prefix.residency import FinishedTurn, Match, PromptBase, Residency
from vllm_stateful.prefix.residency_store import ResidencyStore
from vllm_stateful.types import Demotion, Identity, SessionKey, TokenArray

BLOCK_SIZE = 4


def array(tokens: Iterable[int]) -> TokenArray:
    return np.fromiter(tokens, np.int32)


def key(session_id: str, salt: str | None = None) -> SessionKey:
    return SessionKey(Identity(salt), session_id)


@dataclass(eq=False)
class Block:
    block_id: int
    ref_cnt: int = 0
    slots: list[object] = field(default_factory=lambda: [None] * BLOCK_SIZE, repr=False)
    """What KV each slot holds: the tokens up to and with its own."""


class FakePool:
    """Blocks with reference counts; giving back one that nobody holds fails at once."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [Block(n) for n in range(num_blocks)]
        self.released: list[int] = []

    def take(self, count: int) -> list[Block]:
        free = [block for block in self.blocks if block.ref_cnt == 0][:count]
        assert len(free) == count, "the fake pool is too small for this test"
        self.touch(free)
        return free

    def touch(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def release(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            assert block.ref_cnt > 0, f"block {block.block_id} was released twice"
            block.ref_cnt -= 1
            self.released.append(block.block_id)

    @property
    def ref_cnts(self) -> dict[int, int]:
        """Counts of the blocks that somebody holds."""
        return {block.block_id: block.ref_cnt for block in self.blocks if block.ref_cnt}


@dataclass(eq=False)
class RunningTurn:
    match: Match
    prompt: list[int]
    blocks: list[Block]
    borrowed: Residency | None

    @property
    def session(self) -> SessionKey:
        return self.match.session


class FakeEngine:
    """Turns over a store: borrow one's own idle frontier, else share and copy the last block."""

    def __init__(
        self, budget: int = 1000, num_blocks: int = 1000, rules: BoundaryRules | None = None
    ) -> None:
        self.pool = FakePool(num_blocks)
        self.now = 0.0
        self.store = ResidencyStore(
            BLOCK_SIZE, num_blocks, budget, self.pool.release, lambda: self.now, rules
        )
        self.running: list[RunningTurn] = []
        self.num_turns = 0

    def start(
        self, session: SessionKey, prompt: Sequence[int], base: PromptBase | None = None
    ) -> RunningTurn:
        self.num_turns += 1
        match = self.store.match(session, array(prompt), len(prompt) - 1, base)
        self.store.arrived(match.session)
        found, blocks, borrowed = match.residency, list[Block](), None
        continues = found is not None and found.session == match.session and found.is_idle
        if continues and match.num_tokens == found.frontier:
            borrowed = found
            (table,) = self.store.borrow(found, f"request-{self.num_turns}")
            blocks = table.blocks
        elif found is not None:
            blocks = found.blocks[: match.num_tokens // BLOCK_SIZE]
            self.pool.touch(blocks)
            if match.num_tokens % BLOCK_SIZE:  # copied on write
                blocks += self.pool.take(1)
                blocks[-1].slots[:] = found.blocks[len(blocks) - 1].slots
        self._read(blocks, prompt[: match.num_tokens])
        self._write(blocks, prompt, match.num_tokens)
        turn = RunningTurn(match, list(prompt), blocks, borrowed)
        self.running.append(turn)
        return turn

    def finish(
        self,
        turn: RunningTurn,
        output: Sequence[int] = (),
        tool: str | None = None,
        wish_s: float = 0.0,
    ) -> Residency | None:
        """The turn generated ``output`` and one more token, whose KV is not computed."""
        self.running.remove(turn)
        tokens = [*turn.prompt, *output]
        self._write(turn.blocks, tokens, len(turn.prompt))
        return self.store.finish(
            FinishedTurn(
                session=turn.session,
                prompt=array(turn.prompt),
                output=array(output),
                frontier=len(tokens),
                tables=(Table.of(turn.blocks),),
                borrowed=turn.borrowed,
                base=turn.match.residency,
                num_base_tokens=turn.match.num_tokens,
                version=tuple(turn.prompt),
                tool=tool,
                wish_s=wish_s,
            )
        )

    def preempt(self, turn: RunningTurn) -> None:
        self.running.remove(turn)
        if turn.borrowed is not None:
            self.store.forfeit(turn.borrowed, Demotion.PREEMPTED)
        self.pool.release(reversed(turn.blocks))

    def turn(
        self,
        session: SessionKey | str,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        tool: str | None = None,
    ) -> Residency | None:
        named = key(session) if isinstance(session, str) else session
        return self.finish(self.start(named, prompt), output, tool)

    def kept(
        self, session: SessionKey | str, prompt: Sequence[int], tool: str | None = None
    ) -> Residency:
        """A turn whose residency must be new."""
        made = self.turn(session, prompt, tool=tool)
        assert made is not None
        return made

    def _grow(self, blocks: list[Block], num_tokens: int) -> None:
        blocks.extend(self.pool.take(-(-num_tokens // BLOCK_SIZE) - len(blocks)))

    def _write(self, blocks: list[Block], tokens: Sequence[int], start: int) -> None:
        self._grow(blocks, len(tokens))
        for place in range(start, len(tokens)):
            slots = blocks[place // BLOCK_SIZE].slots
            slots[place % BLOCK_SIZE] = tuple(tokens[: place + 1])

    @staticmethod
    def _read(blocks: list[Block], tokens: Sequence[int]) -> None:
        for place in range(len(tokens)):
            found = blocks[place // BLOCK_SIZE].slots[place % BLOCK_SIZE]
            assert found == tuple(tokens[: place + 1]), "the KV of other tokens"

    def check(self) -> None:
        """Every reference is explained, and the pin ledger agrees."""
        idle = [r for r in self.store.residencies() if r.is_idle]
        pinned = Counter(block.block_id for r in idle for block in r.blocks)
        used = Counter(block.block_id for turn in self.running for block in turn.blocks)
        assert self.pool.ref_cnts == dict(pinned + used)
        pins = self.store.pins
        assert pins.num_pinned == len(pinned)
        assert all(
            pins.holders(block.block_id) == pinned[block.block_id] for block in self.pool.blocks
        )
        assert self.store.num_idle == len(idle)
        for residency in idle:
            assert len(residency.blocks) == -(-residency.frontier // BLOCK_SIZE)
            assert residency.block_ids.tolist() == [b.block_id for b in residency.blocks]
            self._read(residency.blocks, residency.tokens.tolist())


HISTORY = list(range(100, 122))
"""22 tokens: five full blocks and one half full."""


def parallel(engine: FakeEngine, session: SessionKey, *continuations: Sequence[int]) -> None:
    turns = [engine.start(session, [*HISTORY, *more]) for more in continuations]
    for turn in turns:
        engine.finish(turn)
