# SPDX-License-Identifier: Apache-2.0
"""Residencies: the KV that finished turns left in the block pool.

A residency is an immutable fact: "these blocks hold the KV of exactly these tokens, and a turn may
continue at these positions". With full attention it may at every position; elsewhere at the
residency's resume points (`prefix.groups`). Its last block may be partly filled; what lies behind
the frontier is nobody's, so one turn at a time may append there in place while every other reader
still sees what it was promised. Under pressure a residency gives up its end and stays as a smaller
fact, which ends where a message does, or at an earlier resume point.

Source: arXiv:2605.26289 (persistent per-session KV, metadata-only aliasing).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from vllm_stateful.prefix.groups.table import (
    Blocks,
    ResumePoint,
    Tables,
    joined_blocks,
    joined_ids,
)
from vllm_stateful.prefix.radix_tree import RadixTree
from vllm_stateful.prefix.reasoning import Reasoning
from vllm_stateful.schedule.gaps import Forecast, Wait, WaitKind
from vllm_stateful.schedule.retention import Worth
from vllm_stateful.types import BlockIds, Outcome, SessionKey, Shape, TokenArray

ANONYMOUS = "anonymous-"
"""Prefix of the ids given to sessions that no client named."""


def is_anonymous(session: SessionKey) -> bool:
    """Whether no client named this session."""
    return session.session_id.startswith(ANONYMOUS)


@dataclass(eq=False, slots=True)
class Residency:
    """The KV of one finished turn."""

    session: SessionKey
    frontier: int
    """Tokens whose KV is computed, plus the lookahead (``groups.table.Group.lookahead``)."""
    tables: Tables
    """The block tables of the full-attention groups, up to the frontier. A table's block list grows
    in place while a turn borrows the residency."""
    forecast: Forecast
    """When its session is expected back."""
    tree: RadixTree[Residency] = field(repr=False)
    """The tree that holds its tokens."""
    num_asked: int
    """Tokens of its turn's prompt. What lies behind them is the answer."""
    num_turns: int = 1
    version: Hashable = field(default=None, repr=False)
    """The name of its turn's prompt; None when the prompt has no name."""
    wished_until_s: float = 0.0
    """The time until which its client asked to keep it; 0 without such a wish."""
    reasoning: Reasoning | None = None
    """The reasoning in its answer, whether the KV of it is kept or not."""
    wait: WaitKind = WaitKind.USER
    """What its session waits for."""
    points: list[ResumePoint] = field(default_factory=list)
    """Its resume points by position, for models that cannot be continued everywhere. The last one
    of an idle residency is its frontier. A turn that borrows the residency takes that point away,
    and owns the others."""
    lent: ResumePoint | None = None
    """The point that a borrower took away."""
    borrower: str | None = None
    """The request that continues this residency in place, or None while it is idle."""
    shape: Shape = Shape.OTHER
    """What the request of its turn was made of."""
    superseded: bool = False
    alive: bool = True

    @property
    def tokens(self) -> TokenArray:
        """Shape ``[frontier]``: the tokens whose KV is computed. Put together, so O(frontier)."""
        return np.asarray(self.tree.tokens_of(self), np.int32)

    @property
    def blocks(self) -> Blocks:
        """All blocks of the full-attention groups."""
        return joined_blocks(self.tables)

    @property
    def block_ids(self) -> BlockIds:
        """The ids of ``blocks``."""
        return joined_ids(self.tables)

    @property
    def num_blocks(self) -> int:
        """Blocks that it holds. A block that several of its points hold counts once for each."""
        held = sum(len(table.blocks) for table in self.tables)
        return held + sum(len(table.blocks) for point in self.points for table in point.tables)

    def point_at(self, most: int) -> ResumePoint | None:
        """The last resume point that is at a position or before it."""
        for point in reversed(self.points):
            if point.position <= most:
                return point
        return None

    @property
    def is_idle(self) -> bool:
        """Whether the store owns its blocks: neither lent nor dropped."""
        return self.alive and self.borrower is None

    @property
    def worth(self) -> Worth:
        return Worth.SUPERSEDED if self.superseded else Worth.LIVE


class PromptBase(NamedTuple):
    """An earlier prompt that begins a prompt, as the transport knows (``transport.bases``)."""

    version: Hashable
    num_tokens: int
    """Tokens that both prompts share, at least."""


class Match(NamedTuple):
    """What a new turn can reuse."""

    session: SessionKey
    outcome: Outcome
    residency: Residency | None
    num_tokens: int
    """The position at which the turn can continue."""
    point: ResumePoint | None = None
    """The resume point at that position; None where every position can be continued."""
    related: Residency | None = None
    """The residency that shares most tokens with the turn, even if it cannot be continued there."""
    num_shared: int = 0
    """Tokens that ``related`` shares with the turn."""


@dataclass(slots=True)
class FinishedTurn:
    """What a turn leaves behind."""

    session: SessionKey
    prompt: TokenArray
    output: TokenArray
    frontier: int
    """Tokens of prompt and output whose KV is in the blocks, plus the lookahead
    (``groups.table.Group.lookahead``)."""
    tables: Tables
    """The block tables of the full-attention groups. Those of other groups are in the points."""
    points: list[ResumePoint] = field(default_factory=list)
    """Its resume points by position, for models that cannot be continued everywhere. No point lies
    behind the frontier."""
    borrowed: Residency | None = None
    base: Residency | None = None
    """The residency that shares most tokens with it: borrowed, shared or only compared."""
    num_base_tokens: int = 0
    """Tokens that ``base`` shares with it."""
    version: Hashable = None
    """The prompt's own name, by which a later one refers to it (``PromptBase``)."""
    tool: str | None = None
    """The tool that its answer calls; empty when the name is not known, None without a call."""
    expected_s: float | None = None
    """Seconds after which its client expects the tool to have ended; None where it does not say."""
    wish_s: float = 0.0
    """Seconds for which its client asked to keep it."""
    shape: Shape = Shape.OTHER
    """What its request was made of."""

    def wait(self, num_turns: int) -> Wait:
        """What its session waits for after this turn, its ``num_turns``-th."""
        kind = WaitKind.USER if self.tool is None else WaitKind.TOOL
        if num_turns == 1 and is_anonymous(self.session):
            kind = WaitKind.ONE_SHOT
        return Wait(kind, self.tool or "", num_turns)

    def tokens_from(self, start: int) -> TokenArray:
        """The tokens from a position up to the frontier."""
        num_prompt = len(self.prompt)
        if self.frontier <= num_prompt:
            return self.prompt[start : self.frontier]
        output = self.output[max(0, start - num_prompt) : self.frontier - num_prompt]
        if start >= num_prompt:
            return output
        return np.concatenate([self.prompt[start:], output])


class OffloadTier(Protocol):
    """The offload tier, which is told which sessions wait (``adapters.engine.offload_tier``)."""

    def waits(
        self, session: SessionKey, forecast: Forecast, num_tokens: int, wished_until_s: float
    ) -> None:
        """A turn of the session ended, and left ``num_tokens`` tokens."""

    def closed(self, session: SessionKey) -> None:
        """The session is over."""
