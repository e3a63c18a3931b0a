# SPDX-License-Identifier: Apache-2.0
"""The record of one turn: what it reused, why not more, and how long each part took."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from vllm_stateful.types import SessionKey


class Cause(StrEnum):
    """Why a turn computed tokens that an earlier turn of its session had computed."""

    NONE = "none"
    """It computed nothing twice."""
    NEVER_SEEN = "never_seen"
    """It is the first turn of its session that the engine remembers."""
    CHANGED = "changed"
    """The history that the client sent differs from the earlier one at some token."""
    EVICTED = "evicted"
    """The KV of the session was given back."""
    SNAPSHOT_MISSING = "snapshot_missing"
    """No resume point was left where the turn could go on. A model with windows or recurrent states
    needs one."""
    OTHER_TENANT = "other_tenant"
    """The session id is known with another API key. Only the operator is told."""
    OTHER_SALT = "other_salt"
    """The session id is known with another ``cache_salt`` of the same API key."""
    OTHER_LORA = "other_lora"
    """The session id is known with another LoRA adapter."""
    SIDE_REQUEST = "side_request"
    """It stands beside the history of its session: it has no tools and no earlier answer, but other
    turns have tools. Agents ask for titles and summaries in this way."""
    BYPASSED = "bypassed"
    """Stock vLLM served the turn."""


@dataclass(slots=True)
class Missed:
    """Why a turn did not reuse more.

    Attributes:
        cause: the main reason.
        num_tokens: the number of tokens that it computed although an earlier turn of its session
            had computed tokens at these positions.
        token: the index of the first token that differs, for `Cause.CHANGED`. 0 is the prompt's
            first.
        message: the index of the message that holds it, or None where boundaries are not known.
        kind: what is at that place in the earlier history: ``system``, ``tools``, ``user``,
            ``assistant``, ``reasoning``, ``tool_call``, ``tool_result`` or ``other``.
        num_behind_snapshot: the number of tokens before the difference that were the same, but had
            no resume point behind them.
        why_gone: the reason for `Cause.EVICTED` (``types.Demotion``, or `why.NOT_KEPT`), and for
            `Cause.BYPASSED` (``types.Bypass``).
        gone_s: seconds since the KV was given back.
        idle_s: seconds for which it had not been used when it was given back.
        before: the text of the earlier history at the first difference, where asked for.
        now: the text of this prompt at the first difference, where asked for.
    """

    cause: Cause = Cause.NONE
    num_tokens: int = 0
    token: int | None = None
    message: int | None = None
    kind: str | None = None
    num_behind_snapshot: int = 0
    why_gone: str | None = None
    gone_s: float | None = None
    idle_s: float | None = None
    before: str | None = None
    now: str | None = None


class Said(NamedTuple):
    """What the client said of its turn. Nothing is decided by it.

    Attributes:
        source: where it named its session (``request.session_identity``).
        parent: the session id of the agent that started this one, as the engine knows it.
        compaction: whether the turn summarizes its own history.
        rejected: why session ids that it sent were not used.
        retry: how often the client had sent the same request before.
        window: the number of its context window.
        merged: the number of its system messages in mid-conversation that vLLM merged into the
            first one.
    """

    source: str = "none"
    parent: str | None = None
    compaction: bool = False
    rejected: str | None = None
    retry: int = 0
    window: int | None = None
    merged: int = 0

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> Said:
        """Read a payload that came over the wire; unknown fields are left out."""
        types = (str, str, bool, str, int, int, int)
        found: dict[str, Any] = {name: payload.get(name) for name in cls._fields}
        return cls(
            **{
                name: found[name]
                for name, expected in zip(cls._fields, types, strict=True)
                if type(found[name]) is expected
            }
        )

    def as_payload(self) -> dict[str, Any]:
        """The payload for the wire: the fields that are not at their defaults."""
        nothing = self._field_defaults
        return {name: value for name, value in self._asdict().items() if value != nothing[name]}


NOTHING_SAID = Said()


@dataclass(slots=True)
class TurnRecord:
    """One turn. Durations are in seconds; what has not happened yet is None.

    Attributes:
        request_id: the engine's id of the request. It begins with the client's id.
        session: the session that it was found to continue.
        arrived_at: wall clock, seconds since 1970.
        outcome: ``types.Outcome``.
        num_prompt: the number of tokens in the prompt.
        num_reused: the number of these tokens whose KV was on the device.
        num_loaded: the number of these tokens whose KV a connector loaded.
        num_output: the number of tokens in the answer.
        missed: why it did not reuse more.
        waited_for: what the session waited for before this turn: ``user``, or the name of a tool.
        waited_s: how long the session waited.
        queue_s: from arrival until it was scheduled first.
        lookup_s: host time of finding and taking over its KV; a part of ``queue_s``.
        first_token_s: from being scheduled to the first token of the answer.
        decode_s: from the first token to the end.
        num_drafted: the number of drafted tokens that were verified.
        num_accepted: the number of tokens in the answer that were drafted, and were right.
        ended: vLLM's name of the reason why it ended: ``stop``, ``length``, ``abort``, ...
        is_kept: whether the session keeps its KV.
        said: what the client said of the turn.
        window_before: the number of the context window that the session had before this turn.
    """

    request_id: str
    session: SessionKey
    arrived_at: float
    outcome: str = ""
    num_prompt: int = 0
    num_reused: int = 0
    num_loaded: int = 0
    num_output: int = 0
    missed: Missed = field(default_factory=Missed)
    waited_for: str | None = None
    waited_s: float | None = None
    queue_s: float | None = None
    lookup_s: float = 0.0
    first_token_s: float | None = None
    decode_s: float | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    ended: str | None = None
    is_kept: bool = False
    said: Said = NOTHING_SAID
    window_before: int | None = None
    since_s: float = field(default=0.0, repr=False)
    """When the current part of the turn began, on the engine's clock."""

    @property
    def num_computed(self) -> int:
        """The number of the prompt's tokens that the turn computed."""
        return self.num_prompt - self.num_reused - self.num_loaded

    def sampled(self, num_tokens: int, now_s: float) -> None:
        """Note that a step sampled ``num_tokens`` of the answer, all but one of them drafts."""
        self.num_accepted += num_tokens - 1
        if self.first_token_s is None:
            self.first_token_s = now_s - self.since_s
            self.since_s = now_s

    def as_dict(self) -> dict[str, Any]:
        """The record for the wire.

        The tenant is already hashed. Only the excerpts are content.
        """
        missed = {
            name: value
            for name in Missed.__slots__
            if (value := getattr(self.missed, name)) is not None
        }
        return {
            "request_id": self.request_id,
            "session_id": self.session.session_id,
            "session": name_of(self.session),
            "tenant": self.session.identity.tenant,
            "arrived_at": self.arrived_at,
            "outcome": self.outcome,
            "prompt_tokens": self.num_prompt,
            "reused_tokens": self.num_reused,
            "loaded_tokens": self.num_loaded,
            "computed_tokens": self.num_computed,
            "output_tokens": self.num_output,
            "drafted_tokens": self.num_drafted,
            "accepted_draft_tokens": self.num_accepted,
            "missed": {**missed, "cause": str(self.missed.cause)},
            "waited_for": self.waited_for,
            "waited_s": self.waited_s,
            "queue_s": self.queue_s,
            "lookup_s": self.lookup_s,
            "first_token_s": self.first_token_s,
            "decode_s": self.decode_s,
            "ended": self.ended,
            "kept": self.is_kept,
            "said": self.said._asdict(),
            "window_before": self.window_before,
        }


def name_of(session: SessionKey) -> str:
    """A name of a session that does not reveal its id: 16 hex characters."""
    identity = session.identity
    text = f"{identity.cache_salt}\0{identity.lora}\0{session.session_id}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
