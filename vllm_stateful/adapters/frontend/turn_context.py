# SPDX-License-Identifier: Apache-2.0
"""API process: holds what is known of the turn that is being served.

A `TurnContext` grows on its way. ``TenantMiddleware`` begins one for each HTTP request, outside of
every task that vLLM makes for it. The renderer adds the cache salt of the prompt. ``identify``
makes one for each request that it identifies. ``stamp`` makes that one current in the task that
makes the ``EngineCoreRequest``. A context is never changed: code that knows more makes a new one.
So two requests of one HTTP request never see each other's facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace

from vllm_stateful.adapters.frontend.tool_call_plan import ToolCallPlan
from vllm_stateful.request import RetentionWish, TurnIdentity
from vllm_stateful.types import Shape


@dataclass(frozen=True, slots=True)
class CacheControl:
    """What the header ``Cache-Control`` of an HTTP request says to the response cache.

    Attributes:
        is_stored: whether the answer may be kept. ``no-store`` says no.
        is_looked_up: whether a kept answer may be given. ``no-store``, ``no-cache`` and
            ``max-age=0`` say no.
    """

    is_stored: bool
    is_looked_up: bool

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> CacheControl:
        """Read the headers of an HTTP request.

        Args:
            headers: starlette's, or any mapping with lower-case names.
        """
        said = {part.strip().lower() for part in headers.get("cache-control", "").split(",")}
        is_stored = "no-store" not in said
        return cls(is_stored, is_stored and "no-cache" not in said and "max-age=0" not in said)


@dataclass(frozen=True, slots=True)
class TurnContext:
    """What the API process knows of one turn. Outside of any request it knows nothing.

    The first three are known of every request that comes over HTTP, the others once its turn is
    identified.

    Attributes:
        tenant: the tenant of the HTTP request, by its API key. It is "" without a key, and where
            API keys do not separate tenants.
        salt: the ``cache_salt`` of the prompt that is being rendered.
        cache_control: what the HTTP request tells the response cache. None outside of HTTP, and
            where no answers are kept.
        identity: the session and the tenant of the turn. None where vLLM did not ask for a session.
        wish: how long the client wishes its conversation kept.
        plan: how the tool calls of the answer are checked. None where they are not.
        tools: a digest of the tools and of how they may be chosen. Empty where no answers are kept.
        opening: how the conversation begins. None where no engine core is chosen by it.
        forced_tool: the tool that the answer must call.
        shape: what the request is made of.
        num_merged: the number of system messages in mid-conversation that vLLM merges into the
            first one.
        is_prepared_only: whether the client wants its prompt prepared, and no answer.
        request_id: the id of the request to the engine. It is "" before there is one.
    """

    tenant: str = ""
    salt: str = ""
    cache_control: CacheControl | None = None
    identity: TurnIdentity | None = None
    wish: RetentionWish | None = None
    plan: ToolCallPlan | None = None
    tools: bytes = b""
    opening: str | None = None
    forced_tool: str | None = None
    shape: Shape = Shape.OTHER
    num_merged: int = 0
    is_prepared_only: bool = False
    request_id: str = ""


NOTHING_KNOWN = TurnContext()

_current: ContextVar[TurnContext] = ContextVar("stateful_turn", default=NOTHING_KNOWN)


def current() -> TurnContext:
    """The turn that this task serves; `NOTHING_KNOWN` outside of any request."""
    return _current.get()


def begin(tenant: str, cache_control: CacheControl | None) -> None:
    """Begin the context of an HTTP request."""
    _current.set(TurnContext(tenant, cache_control=cache_control))


def note_salt(cache_salt: str | None) -> None:
    """Note the cache salt of the request whose prompt is being rendered."""
    _current.set(replace(current(), salt=cache_salt or ""))


def prompt_owner() -> tuple[str, str]:
    """The tenant and cache salt of the prompt being rendered, which may share its memory.

    A thread does not see the context of the task that gave it work, so it must be told them.
    """
    turn = current()
    return (turn.tenant, turn.salt)


def enter(turn: TurnContext, request_id: str) -> TurnContext:
    """Make a turn the current one of this task, while its request to the engine is being made.

    What the task knows of its HTTP request stays. A task outside of the HTTP request does not learn
    the tenant, because the next request that it makes may be another tenant's.

    Args:
        turn: the turn as it was identified; `NOTHING_KNOWN` where it was not.
        request_id: the id of the request.

    Returns:
        The current turn.
    """
    here = current()
    entered = replace(
        turn,
        tenant=here.tenant,
        salt=here.salt,
        cache_control=here.cache_control,
        request_id=request_id,
    )
    _current.set(entered)
    return entered


def plan_of_request(request_id: str | None) -> ToolCallPlan | None:
    """How to check the tool calls in the answer to a request; None where they are not checked.

    A request and its state are made in one task. Neither ``EngineCoreRequest`` nor its parameters
    can hold a plan, because they are copied for each of several answers.

    Args:
        request_id: the id that the request had when its turn was entered.
    """
    turn = current()
    return turn.plan if turn.request_id == request_id else None
