# SPDX-License-Identifier: Apache-2.0
"""Drafts for running turns, from their sessions' own tokens and their agents' earlier answers.

A session's index is kept from turn to turn and grows by the new tokens. A running turn owns the
index of its session. A second turn of the same session at the same time builds an index of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_stateful.speculate.beside_head import BesideHead
from vllm_stateful.speculate.drafts import (
    MAX_DRAFT,
    NO_DRAFT,
    NOWHERE,
    Acceptance,
    Draft,
    Text,
    draft_of,
)
from vllm_stateful.speculate.earlier_answers import EarlierAnswers
from vllm_stateful.speculate.lookup_index import LookupIndex
from vllm_stateful.speculate.step_costs import LEAST_CHANCE
from vllm_stateful.types import TokenArray


def compile_now() -> None:
    """Compile or load all functions that drafts need, so that no turn waits a second or more."""
    drafts = SessionDrafts(1 << 20, num_head_tokens=1)
    text = np.array([1, 2, 3, 1, 2, 3, 1], np.int32)
    for name in range(2):  # the second turn also finds the first one's answer
        drafts.begins(name, name, None, text)
        drafts.draft_beside(name, text[:1])
        drafts.came(name, text[1:3])
        drafts.ends(name)


@dataclass(eq=False, slots=True)
class _Running:
    session: Hashable
    agent: Hashable
    index: LookupIndex
    num_prompt: int
    draft: Draft = NO_DRAFT
    head: TokenArray | None = None
    """The draft of a drafting head for the same step."""
    is_verified: bool = True
    """Whether ``draft`` is verified, and not the head's draft."""


class _Waiting(NamedTuple):
    known: LookupIndex
    since_s: float


class SessionDrafts:
    """Drafts for all running turns of one engine core. Not thread-safe.

    Args:
        max_bytes: memory for the indexes of waiting sessions, and as much for earlier answers.
        num_head_tokens: tokens in a draft of the drafting head; 0 without a head.
    """

    def __init__(self, max_bytes: int, num_head_tokens: int = 0) -> None:
        self.beside = BesideHead(num_head_tokens) if num_head_tokens else None
        """Compares drafts with those of the drafting head; None without a head."""
        self.num_drafted = 0
        self.num_accepted = 0
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._waiting: OrderedDict[Hashable, _Waiting] = OrderedDict()
        """The waiting sessions. The one whose last turn ended longest ago comes first."""
        self._running: dict[Hashable, _Running] = {}
        self._earlier = EarlierAnswers(max_bytes)
        self._acceptance: dict[Hashable, Acceptance] = {}

    def __contains__(self, name: Hashable) -> bool:
        return name in self._running

    def __len__(self) -> int:
        return len(self._running)

    def begins(
        self, name: Hashable, session: Hashable, agent: Hashable, prompt: TokenArray
    ) -> None:
        """Begin a turn.

        Args:
            name: the name of the turn.
            session: the session whose index the turn continues.
            agent: the tenant, LoRA adapter, system message and tools whose answers are drafted
                from.
            prompt: shape ``[num_tokens]``. What the index already has of it is not indexed again.
        """
        known = self.forget(session)
        index = LookupIndex() if known is None else known
        num_shared = _num_shared(index.tokens, prompt)
        index.truncate(num_shared)
        index.extend(prompt[num_shared:])
        self._running[name] = _Running(session, agent, index, len(prompt))

    def came(self, name: Hashable, tokens: TokenArray) -> None:
        """Add generated tokens to a turn, and learn how many of its last draft were right."""
        turn = self._running[name]
        if len(turn.draft.tokens):
            num_right = self._of(turn.agent).saw(turn.draft, tokens)
            if turn.is_verified:
                self.num_drafted += len(turn.draft.tokens)
                self.num_accepted += num_right
            if self.beside is not None and turn.head is not None:
                num_session = _num_shared(_with_tail(turn.draft, turn.head), tokens)
                num_head = _num_shared(turn.head, tokens)
                self.beside.saw(
                    turn.draft.expected, num_session, num_head, is_session=turn.is_verified
                )
        elif self.beside is not None and turn.head is not None:
            self.beside.saw_nothing()
        _forget_draft(turn)
        turn.index.extend(tokens)

    def num_tokens(self, name: Hashable) -> int:
        """The number of tokens of a running turn that are known here."""
        return len(self._running[name].index)

    def draft(self, name: Hashable, least_chance: float, max_tokens: int = MAX_DRAFT) -> TokenArray:
        """Draft the next tokens of a turn; see ``drafts.draft_of``.

        Nothing is looked up when no token can be worth its cost (``least_chance`` is 1 or more).
        """
        turn = self._running[name]
        if least_chance >= 1.0 or max_tokens <= 0:
            return NO_DRAFT.tokens
        others = NOWHERE
        earlier = self._earlier.of(turn.agent)
        if earlier is not None:
            found = earlier.find_end_of(turn.index.tokens, len(turn.index))
            others = Text(earlier.tokens, found)
        own = Text(turn.index.tokens, turn.index.find())
        turn.draft = draft_of(
            own, self._of(turn.agent), least_chance, others=others, max_tokens=max_tokens
        )
        return turn.draft.tokens

    def draft_beside(self, name: Hashable, head: TokenArray) -> TokenArray:
        """Choose the draft to verify in a turn for which a drafting head has a draft, too.

        Args:
            name: the name of the turn.
            head: the tokens that the head proposes, shape ``[num_tokens]``.

        Returns:
            As many tokens as ``head``: the session's draft, completed with the head's tokens at the
            positions behind it; or the head's draft, if drafts like it were right more often.
        """
        turn = self._running[name]
        self.draft(name, LEAST_CHANCE, len(head))
        turn.head = head
        turn.is_verified = (
            len(turn.draft.tokens) > 0
            and self.beside is not None
            and self.beside.is_better(turn.draft.expected)
        )
        return _with_tail(turn.draft, head) if turn.is_verified else head

    def withdraw(self, name: Hashable) -> None:
        """Forget the last draft of a turn, which will not be verified. A no-op if not running."""
        if name in self._running:
            _forget_draft(self._running[name])

    def ends(self, name: Hashable, now_s: float = 0.0) -> None:
        """End a turn, and keep its index for the session's next turn. A no-op if not running."""
        turn = self._running.pop(name, None)
        if turn is None:
            return
        tokens, num_prompt = turn.index.tokens, turn.num_prompt
        if len(tokens) > num_prompt:
            self._earlier.add(turn.agent, tokens[:num_prompt], tokens[num_prompt:])
        self.forget(turn.session)
        self._num_bytes += turn.index.num_bytes
        self._waiting[turn.session] = _Waiting(turn.index, now_s)
        while self._num_bytes > self._max_bytes:
            self.forget(next(iter(self._waiting)))

    def forget(self, session: Hashable) -> LookupIndex | None:
        """Give up the index of a waiting session, and return it; None when it has none."""
        waiting = self._waiting.pop(session, None)
        if waiting is None:
            return None
        self._num_bytes -= waiting.known.num_bytes
        return waiting.known

    def forget_before(self, deadline_s: float) -> None:
        """Give up the indexes of waiting sessions whose last turn ended before a time."""
        while self._waiting:
            session, waiting = next(iter(self._waiting.items()))
            if waiting.since_s >= deadline_s:
                return
            self.forget(session)

    def waiting(self) -> list[Hashable]:
        """The sessions whose index waits for their next turn."""
        return list(self._waiting)

    def _of(self, agent: Hashable) -> Acceptance:
        """How often drafts for an agent were accepted; forgotten when its answers are."""
        found = self._acceptance.get(agent)
        if found is None:
            if len(self._acceptance) > 2 * len(self._earlier) + 64:
                known = [each for each in self._acceptance if self._earlier.of(each) is not None]
                self._acceptance = {each: self._acceptance[each] for each in known}
            found = self._acceptance[agent] = Acceptance()
        return found


def _forget_draft(turn: _Running) -> None:
    turn.draft, turn.head, turn.is_verified = NO_DRAFT, None, True


def _with_tail(draft: Draft, head: TokenArray) -> TokenArray:
    """A draft, completed to the head's length with the head's tokens at the positions behind it."""
    return np.concatenate([draft.tokens, head[len(draft.tokens) :]])


def _num_shared(one: TokenArray, other: TokenArray) -> int:
    """The length of the common prefix."""
    num = min(len(one), len(other))
    equal = one[:num] == other[:num]
    return num if equal.all() else int(np.argmin(equal))
