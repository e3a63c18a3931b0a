# SPDX-License-Identifier: Apache-2.0
"""One vLLM request seen as a turn: its identity, its tokens, and what it may reuse."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.kv_hints import KvHintsEnvelope
from vllm.v1.request import Request

from vllm_stateful.adapters.engine.mm_tokens import can_be_named, with_features
from vllm_stateful.adapters.model_input import identity_of
from vllm_stateful.adapters.slots import of_request, on_request
from vllm_stateful.prefix.groups import ResumePoint
from vllm_stateful.prefix.residency import ANONYMOUS, PromptBase, Residency
from vllm_stateful.prefix.resume_places import Place
from vllm_stateful.request.agent_hint import seconds_of
from vllm_stateful.request.retention_wish import hinted_seconds
from vllm_stateful.request.session_identity import id_fault
from vllm_stateful.schedule.waits import Ended
from vllm_stateful.session import Said, TurnRecord
from vllm_stateful.transport.wire import (
    CLOSE_ACTION,
    EXPECT_ACTION,
    RETAIN_ACTION,
    SHAPE_ACTION,
    TOOL_ACTION,
    TURN_ACTION,
)
from vllm_stateful.types import (
    BlockIds,
    Bypass,
    Outcome,
    SessionKey,
    Shape,
    TokenArray,
    token_array,
)

_SHAPES = frozenset(Shape)


class Offer(NamedTuple):
    """KV that a lookup found in a residency."""

    blocks: KVCacheBlocks
    residency: Residency
    num_tokens: int
    outcome: Outcome
    point: ResumePoint | None = None
    """The resume point at that position, where not every position can be continued."""


@dataclass(slots=True)
class Turn:
    """The state of a waiting or running request, from its first lookup to its end."""

    session: SessionKey
    prompt: TokenArray
    """Its token ids. Everything that is not text has ids of its own (``mm_tokens``)."""
    version: Hashable = None
    """The name by which a later prompt may refer to this one."""
    prompt_base: PromptBase | None = None
    """The earlier prompt that this one was sent as a continuation of."""
    epoch: int = 0
    """The number of resets at its last lookup. KV computed before a reset is not kept."""
    offer: Offer | None = None
    """What the last lookup returned; None when that was stock vLLM's answer."""
    related: tuple[Residency, int] | None = None
    """The residency that shares most tokens with it, and how many; found by its last lookup."""
    wanted: list[Place] = field(default_factory=list)
    """The places where resume points are still to be taken."""
    planned_for: tuple[int, int] | None = None
    """The position at which it continued and the number of shared tokens, when ``wanted`` was
    chosen."""
    points: list[ResumePoint] = field(default_factory=list)
    """The resume points that it holds, by position."""
    num_read: int = 0
    """The number of tokens, including the prompt, that were searched for segments of the answer."""
    inherited_ids: list[BlockIds] = field(default_factory=list)
    """The blocks of the points that it took over from an idle residency, as noted in the pin
    ledger."""
    borrowed: Residency | None = None
    shared_ids: BlockIds | None = None
    """The full blocks that it shares with a residency, as noted in the pin ledger."""
    only_full_blocks: bool = False
    """Its hit was refused, because no block was free to copy a partly filled one. The next lookup
    offers whole blocks only."""
    has_made_room: bool = False
    """Its allocation was refused, and other residencies or turns gave blocks for it."""
    is_loading: bool = False
    """A KV connector loads what is behind its hit."""
    has_failed: bool = False
    """Its blocks may hold KV whose load failed or had not ended."""
    has_arrived: bool = False
    """The wait before it has been learned from."""
    is_counted: bool = False
    is_closing: bool = False
    """Its session was closed while it ran, or this is its last turn."""
    lookup_s: float = 0.0
    nearest: tuple[Residency, int] | None = None
    """The residency with which it is compared for people, and the number of shared tokens. It is of
    its own session, if that has any, even if the tokens are too few to be used."""
    waited: Ended | None = None
    """The wait of its session that this turn ended."""
    shape: Shape = Shape.OTHER
    is_beside: bool = False
    """It stands beside the history of its session, as a request for a title does."""
    record: TurnRecord | None = None
    """Its record; None before it is scheduled, and where no records are kept."""
    text: TokenArray | None = None
    """The token ids of its prompt as the model gets them; None where ``prompt`` has the same."""
    named: SessionKey = field(init=False)
    """The session that its request names. ``session`` is the session that it was found to
    continue."""

    def __post_init__(self) -> None:
        self.named = self.session

    @property
    def token_ids(self) -> TokenArray:
        """The prompt as the model gets it, shape ``[num_prompt_tokens]``."""
        return self.prompt if self.text is None else self.text


def bypass_reason(request: Request, caching: bool) -> Bypass | None:
    """Why this request must be served by stock vLLM; None when it is an ordinary turn."""
    if not caching:
        return Bypass.PREFIX_CACHING_OFF
    if request.pooling_params is not None:
        return Bypass.POOLING
    if request.resumable:
        return Bypass.STREAMING_INPUT
    if request.mm_features and not can_be_named(request.mm_features):
        return Bypass.MULTIMODAL
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        return Bypass.PROMPT_EMBEDS
    if request.skip_reading_prefix_cache:
        params = request.sampling_params
        asks = params is not None and params.prompt_logprobs is not None
        return Bypass.PROMPT_LOGPROBS if asks else Bypass.NO_CACHE_READ
    return None


def session_of(request: Request) -> SessionKey:
    """The session that a request names, or an anonymous one of its own.

    An id that is too short or a placeholder names nothing (``request.session_identity.id_fault``).
    """
    named = request.session_id if id_fault(request.session_id) is None else None
    return SessionKey(identity_of(request), named or ANONYMOUS + request.request_id)


def is_final(request: Request) -> bool:
    """Whether the client said that this is its session's last turn (a KV hint)."""
    hints = request.kv_hints
    return hints is not None and any(a.action_type == CLOSE_ACTION for a in hints.actions)


def take_said(request: Request) -> None:
    """Take what the client said of its turn out of its KV hints, which connectors may read too."""
    hints = request.kv_hints
    if hints is None:
        return
    others = [action for action in hints.actions if action.action_type != TURN_ACTION]
    for action in hints.actions:
        if action.action_type == TURN_ACTION:
            on_request(request).said = Said.of(action.payload)
    if len(others) < len(hints.actions):
        made = KvHintsEnvelope(hints.protocol_version, hints.message_id, others)
        request.kv_hints = made if others else None


def retention_wish(request: Request) -> float | None:
    """The seconds without use for which the client wishes its session kept; None without a wish."""
    if request.kv_hints is None:
        return None
    actions = (action for action in request.kv_hints.actions if action.action_type == RETAIN_ACTION)
    return max((hinted_seconds(action.payload) or 0.0 for action in actions), default=0.0) or None


def forced_tool(request: Request) -> str | None:
    """The tool that the answer must call (a KV hint); None where the model chooses."""
    hints = request.kv_hints
    for action in () if hints is None else hints.actions:
        if action.action_type == TOOL_ACTION:
            name = action.payload.get("name")
            return name if isinstance(name, str) else None
    return None


def expected_seconds(request: Request, tool: str | None) -> float | None:
    """How long the client expects a tool to take (a KV hint); None where it does not say."""
    hints = request.kv_hints
    for action in () if hints is None or not tool else hints.actions:
        if action.action_type == EXPECT_ACTION:
            expected = action.payload.get("seconds")
            return seconds_of(expected.get(tool)) if isinstance(expected, Mapping) else None
    return None


def shape_of(request: Request) -> Shape:
    """What the API server said that a request is made of (a KV hint)."""
    hints = request.kv_hints
    for action in () if hints is None else hints.actions:
        if action.action_type == SHAPE_ACTION:
            named = action.payload.get("shape")
            return Shape(named) if isinstance(named, str) and named in _SHAPES else Shape.OTHER
    return Shape.OTHER


def prompt_array(request: Request) -> TokenArray | None:
    """The prompt, shape ``[num_prompt_tokens]``; None when it came without a header."""
    return of_request(request).prompt


def start_turn(request: Request) -> Turn:
    """Make the state of a new turn; copy the prompt's ids if no array of them is at hand."""
    assert request.prompt_token_ids is not None
    array = prompt_array(request)
    if array is None:
        array = token_array(request.prompt_token_ids)
    found, session, shape = of_request(request), session_of(request), shape_of(request)
    if request.mm_features:  # other prompts with these placeholders show something else
        tokens = with_features(array, request.mm_features)
        return Turn(session, tokens, text=array, shape=shape)
    return Turn(session, array, found.version, found.base, shape=shape)


def output_array(request: Request) -> TokenArray:
    """The tokens generated so far, shape ``[num_output_tokens]``."""
    return token_array(list(request.output_token_ids))


def tokens_so_far(turn: Turn, request: Request, num_tokens: int) -> TokenArray:
    """The first ``num_tokens`` tokens of the request, prompt and output.

    Shape ``[num_tokens]``. The prompt part is not converted again.
    """
    num_output = num_tokens - len(turn.prompt)
    if num_output <= 0:
        return turn.prompt[:num_tokens]
    return np.concatenate([turn.prompt, output_array(request)[:num_output]])
