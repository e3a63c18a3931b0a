# SPDX-License-Identifier: Apache-2.0
"""Fills the record of each turn as its request passes through the engine core (`session`)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.logger import init_logger
from vllm.v1.request import Request

from vllm_stateful.adapters.engine.turn import Turn, session_of
from vllm_stateful.adapters.slots import of_request
from vllm_stateful.prefix.matching import Matching
from vllm_stateful.prefix.residency import Residency, is_anonymous
from vllm_stateful.schedule.gaps import WaitKind
from vllm_stateful.schedule.waits import Ended
from vllm_stateful.session import (
    Cause,
    Found,
    Missed,
    Said,
    SessionBook,
    TurnLog,
    TurnRecord,
    why_not_more,
)
from vllm_stateful.types import Bypass, Demotion, Outcome, SessionKey, TokenArray

logger = init_logger("vllm.stateful")

EXCERPT_TOKENS = 24
"""The tokens shown of each of the two texts at a change, with ``--stateful-explain text``."""


MAX_ENDED = 4096
"""The most ended turns that are noted for their spans. The oldest is dropped first."""

MAX_HEADER_CHARS = 512
"""The most characters of a trace header. The standard asks for at least so many to be passed on."""


class EndedTurn(NamedTuple):
    """A turn that has ended: its record, when (seconds since 1970), and its trace headers."""

    record: TurnRecord
    at: float
    headers: dict[str, str]


class TurnRecords:
    """Keeps the records of one scheduler's turns, and the stories of its sessions.

    Args:
        store: its residencies.
        decode: turns token ids into text; None where no text is kept.
        is_traced: whether turns that end are noted for their spans.
    """

    def __init__(
        self,
        store: Matching,
        decode: Callable[[list[int]], str] | None = None,
        *,
        is_traced: bool = False,
    ) -> None:
        self._ended: deque[EndedTurn] | None = deque(maxlen=MAX_ENDED) if is_traced else None
        self.log = TurnLog()
        self.book = SessionBook()
        self._store = store
        self._decode = decode

    def admitted(
        self, request: Request, turn: Turn, outcome: Outcome, num_local: int, num_loaded: int
    ) -> None:
        """Make the record of a turn that was scheduled for the first time.

        Args:
            request: vLLM's.
            turn: its state, with what the lookup found.
            outcome: how it found its context.
            num_local: the number of tokens whose KV was here.
            num_loaded: the number of tokens behind them that a connector loads.
        """
        now_s = self._store.now_s()
        record = self._begun(request, turn.session, outcome, now_s)
        record.num_reused, record.num_loaded = num_local, num_loaded
        record.lookup_s = turn.lookup_s
        record.missed = self._missed(turn, record, now_s)
        self._note_wait(record, turn.waited)
        turn.record = record
        self.log.add(record)
        self.book.admitted(record, self._parent(turn, record.said), now_s, turn.shape)

    def bypassed(self, request: Request, reason: Bypass) -> None:
        """Make the record of a request that stock vLLM serves."""
        record = self._begun(request, session_of(request), Outcome.BYPASSED, self._store.now_s())
        record.missed = Missed(Cause.BYPASSED, why_gone=str(reason))
        self.log.add(record)

    def _begun(
        self, request: Request, session: SessionKey, outcome: Outcome, now_s: float
    ) -> TurnRecord:
        record = TurnRecord(request.request_id, session, request.arrival_time, str(outcome))
        record.num_prompt = int(request.num_prompt_tokens)
        record.queue_s = max(0.0, time.time() - request.arrival_time)
        record.since_s, record.said = now_s, of_request(request).said
        return record

    @staticmethod
    def _parent(turn: Turn, said: Said) -> SessionKey | None:
        """The parent that its client named, else the other session whose KV it begins with."""
        if said.parent is not None:
            return SessionKey(turn.session.identity, said.parent)
        base = turn.related[0].session if turn.related is not None else None
        return base if base != turn.session else None

    @staticmethod
    def _note_wait(record: TurnRecord, waited: Ended | None) -> None:
        if waited is not None:
            is_tool = waited.wait.kind is WaitKind.TOOL
            record.waited_for = (waited.wait.tool or "tool") if is_tool else "user"
            record.waited_s = waited.gap_s

    def _missed(self, turn: Turn, record: TurnRecord, now_s: float) -> Missed:
        nearest, num_shared = turn.nearest or (None, 0)
        is_alive = nearest is not None and nearest.alive
        found = Found(
            num_prompt=record.num_prompt,
            num_reused=record.num_reused + record.num_loaded,
            num_shared=num_shared,
            num_history=nearest.frontier if nearest is not None and is_alive else 0,
            is_own=nearest is not None and self._is_same(turn, nearest, num_shared),
            slack=self._store.groups[0].lookahead,
            has_points=self._store.has_points,
            shape=turn.shape,
            is_beside=turn.is_beside,
        )
        missed = why_not_more(turn.session, found, self.book, now_s)
        if missed.token is not None and nearest is not None:
            missed.kind = self._store.kind_at(nearest, missed.token).name.lower()
            missed.message = self._store.message_at(nearest, missed.token)
            if self._decode is not None:
                missed.before = self._text(nearest.tokens, missed.token)
                missed.now = self._text(turn.token_ids, missed.token)
        return missed

    def _is_same(self, turn: Turn, nearest: Residency, num_shared: int) -> bool:
        """Whether a history is of the turn's session.

        Where no client named any, many conversations begin alike. Then it is the same one if its
        last question is asked again behind the difference.
        """
        if turn.session == nearest.session:
            return True
        are_unnamed = is_anonymous(turn.session) and is_anonymous(nearest.session)
        return are_unnamed and self._store.is_asked_again(nearest, num_shared, turn.prompt)

    def _text(self, tokens: TokenArray, start: int) -> str:
        assert self._decode is not None
        return self._decode(tokens[start : start + EXCERPT_TOKENS].tolist())

    def ended(self, request: Request, turn: Turn, frontier: int, *, is_kept: bool) -> None:
        """Complete the record of a turn that has ended.

        Args:
            request: vLLM's.
            turn: its state.
            frontier: the number of tokens whose KV was computed.
            is_kept: whether its session keeps any of it.
        """
        record = turn.record
        if record is None:
            return
        now_s = self._store.now_s()
        if record.first_token_s is not None:
            record.decode_s = now_s - record.since_s
        record.num_output = int(request.num_output_tokens)
        record.ended = str(request.get_finished_reason())
        record.is_kept = is_kept
        is_beside = record.missed.cause is Cause.SIDE_REQUEST
        self.book.ended(record.session, frontier, now_s, is_kept=is_kept, is_beside=is_beside)
        if self._ended is not None:
            headers = request.trace_headers or {}
            kept = {name: text for name, text in headers.items() if len(text) <= MAX_HEADER_CHARS}
            self._ended.append(EndedTurn(record, time.time(), kept))

    def lost(self, turn: Turn, why: Demotion, num_tokens: int) -> None:
        """Note that nothing is kept of what a turn computed.

        Args:
            turn: its state.
            why: the reason.
            num_tokens: the number of tokens whose KV it had.
        """
        record = turn.record
        if record is not None and num_tokens > 0 and record.missed.cause is not Cause.SIDE_REQUEST:
            self.book.lost(record.session, why, num_tokens, self._store.now_s())

    def take_ended(self) -> list[EndedTurn]:
        """The turns that have ended since the last call, where they are noted."""
        taken = list(self._ended or ())
        if self._ended is not None:
            self._ended.clear()
        return taken

    def demoted(self, session: SessionKey, why: Demotion, num_kept: int) -> None:
        """Note that KV of a session was given back (``ResidencyBook.on_demoted``)."""
        self.book.demoted(session, why, num_kept, self._store.now_s())


def decoder(tokenizer: Any, explain: str) -> Callable[[list[int]], str] | None:
    """A function that turns token ids into text; None without ``--stateful-explain text``.

    The function never fails. It leaves out ids that the tokenizer does not know: what is not text
    has such ids (``mm_tokens``).
    """
    if explain != "text" or tokenizer is None:
        return None
    known = set(tokenizer.get_vocab().values())

    def decode(ids: list[int]) -> str:
        try:
            return str(tokenizer.decode([token for token in ids if token in known]))
        except Exception as error:  # a tokenizer of any kind: the engine goes on without text
            logger.warning_once("stateful: a prompt's text cannot be shown: %r", error)
            return ""

    return decode
