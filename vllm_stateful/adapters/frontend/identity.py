# SPDX-License-Identifier: Apache-2.0
"""API process: finds the session and the tenant of a request, and tells them to the engine.

vLLM asks for a session id once per HTTP request, just before it hands the prompt to the engine.
What is found travels with the answer: a ``str`` that carries its `TurnContext`. When the
``EngineCoreRequest`` is made, it is written into it: the session into ``session_id``; the tenant,
hashed, into ``cache_salt`` (so that vLLM's own block hashes keep tenants apart, too); and the end
of a session and the wish to keep it into KV hints. A context variable that is set where vLLM asks
would not work: vLLM runs a handler in a task of its own, and makes the request of a streamed
response in another. Some routes never ask for a session id (token-in-token-out and others). They
get their tenant from ``TenantMiddleware``, which runs outside both tasks.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from starlette.datastructures import Headers
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

from vllm_stateful.adapters.frontend import cache_diagnostics, session_affinity, session_header
from vllm_stateful.adapters.frontend.sent_body import (
    digest_of_tools,
    num_merged_system,
    sent_body,
    wish_of,
)
from vllm_stateful.adapters.frontend.tool_call_plan import plan_of
from vllm_stateful.adapters.frontend.turn_context import (
    NOTHING_KNOWN,
    CacheControl,
    TurnContext,
    begin,
    current,
    enter,
)
from vllm_stateful.config import process_config
from vllm_stateful.observe.hint_counts import HINT_COUNTS
from vllm_stateful.request import (
    ResponseChain,
    TurnIdentity,
    resolve_turn,
    scoped_salt,
    tenant_of,
)
from vllm_stateful.request.client_signs import has_control_characters
from vllm_stateful.request.retention_wish import hinted_seconds, with_seconds
from vllm_stateful.request.session_identity import id_fault
from vllm_stateful.request.shape import is_prepared_only, shape_of
from vllm_stateful.session import Said
from vllm_stateful.transport.wire import (
    CLOSE_ACTION,
    EXPECT_ACTION,
    HINTS_PROTOCOL,
    RETAIN_ACTION,
    SHAPE_ACTION,
    TOOL_ACTION,
    TURN_ACTION,
)
from vllm_stateful.types import SALT_PREFIX, HintSource, Shape

MAX_TOOL_CHARS = 128
"""The most characters of a tool's name. A longer name is not sent to the engine."""

_responses = ResponseChain()


class IdentifiedSession(str):
    """A session id on its way through vLLM's API process; an empty string without a session."""

    __slots__ = ("turn",)
    turn: TurnContext

    @classmethod
    def of(cls, session_id: str | None, turn: TurnContext) -> IdentifiedSession:
        made = cls(session_id or "")
        made.turn = turn
        return made


class TenantMiddleware:
    """ASGI middleware that notes the tenant of an HTTP request, and what its headers allow."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass everything on unchanged."""
        if scope["type"] in ("http", "websocket"):
            begin_http(Headers(scope=scope))
        await self.app(scope, receive, send)


def begin_http(headers: Headers) -> None:
    """Begin an HTTP request: read its tenant, and what it allows, from its headers."""
    begin(
        tenant_of(headers) if tenant_isolation() else "",
        CacheControl.of(headers) if process_config().response_cache_bytes else None,
    )


def owned_name(name: str, cache_salt: str | None) -> str:
    """A name for an image, sound or video that belongs to the tenant, made from the client's.

    vLLM keeps what it is given under such a name (``uuid``), and uses it when the name comes again.
    Two tenants may give one name to two pictures, and one tenant may guess another's name. So the
    name of a prompt's media is made to depend on the tenant.

    Args:
        name: the client's own name. Any text.
        cache_salt: the salt of the request that is being rendered.
    """
    owner = None if _engine_off is not None else scoped_salt(current().tenant, cache_salt)
    if owner is None:
        return name
    parts = (f"{len(owner)}:{owner}", name)
    digest = hashlib.sha256("".join(parts).encode("utf-8", "surrogatepass")).digest()
    return SALT_PREFIX + digest.hex()


_engine_off: str | None = None


def stand_aside(reason: str | None) -> None:
    """Send requests to the engine as they came, because it serves as stock vLLM.

    Without sessions, a salt by API key would only divide the prefix cache. The salt stays if the
    response cache is on, because kept answers are found by it.

    Args:
        reason: why the engine serves as stock vLLM; None when it does not.
    """
    global _engine_off
    _engine_off = reason


def keeps_sessions() -> bool:
    """Whether the engine keeps sessions, as far as it has said."""
    return _engine_off is None


def tenant_isolation() -> bool:
    """Whether the API key separates tenants (``--stateful-tenant``)."""
    return process_config().tenant == "api-key"


def identify(request: Any, raw_request: Any | None, stock: str | None) -> IdentifiedSession:
    """Hook of ``session-identity``: the session id for the engine, with its turn context.

    Args:
        request: vLLM's parsed chat, completion or responses request. One that was made from an
            Anthropic request lacks fields (``metadata``). These are read from the body.
        raw_request: the HTTP request, or None when there is none.
        stock: the session id that vLLM itself found.
    """
    as_sent = stock
    headers = {} if raw_request is None else raw_request.headers
    body = sent_body(raw_request)

    def field(name: str) -> object:
        value = getattr(request, name, None)
        return body.get(name) if value is None else value

    identity = resolve_turn(headers, field, tenant_isolation=tenant_isolation())
    HINT_COUNTS.ignore(identity.ignored)
    if hasattr(request, "previous_response_id"):
        identity = _responses.resolve(
            identity,
            request.previous_response_id,
            getattr(request, "request_id", None),
            stored=bool(getattr(request, "store", False)),
        )
    if keeps_sessions():
        session_header.note(raw_request, request, body, identity)
    salt = field("cache_salt")
    cache_diagnostics.begin(
        raw_request,
        body,
        (identity.tenant, salt if isinstance(salt, str) else ""),
        is_on=_engine_off is None and process_config().explain != "off",
    )
    if identity.session_id is None and stock is not None and id_fault(stock) is None:
        stock = None  # a gateway's cookie, which names a server
    here = current()
    turn = replace(
        here,
        identity=identity,
        wish=with_seconds(wish_of(raw_request), identity.hint.retain_s),
        plan=plan_of(request, raw_request),
        tools=b"" if here.cache_control is None else digest_of_tools(body),
        opening=session_affinity.opening(raw_request),
        forced_tool=_forced_tool(getattr(request, "tool_choice", None)),
        shape=shape_of(body),
        num_merged=num_merged_system(request, raw_request, body),
        is_prepared_only=is_prepared_only(body),
        request_id="",
    )
    session_id = (identity.session_id or stock) if _engine_off is None else as_sent
    return IdentifiedSession.of(session_id, turn)


def _forced_tool(choice: Any) -> str | None:
    """The function that ``tool_choice`` names, in a chat or a responses request."""
    if getattr(choice, "type", None) != "function":
        return None
    name = getattr(getattr(choice, "function", choice), "name", None)
    if not isinstance(name, str) or len(name) > MAX_TOOL_CHARS or has_control_characters(name):
        return None
    return name


def stamp(request: EngineCoreRequest) -> EngineCoreRequest:
    """Hook of ``request-identity``: write the tenant and the KV hints into the engine's request.

    A request whose prompt is only to be prepared generates one token.

    Where there are several engine cores, also choose the one that the request goes to. Hints that
    the client's own process has set are kept as they are.
    """
    found = request.session_id
    identified = found.turn if isinstance(found, IdentifiedSession) else NOTHING_KNOWN
    turn = enter(identified, request.request_id)
    tenant = turn.tenant if turn.identity is None else turn.identity.tenant
    if turn.is_prepared_only and request.sampling_params is not None:
        request.sampling_params.min_tokens = 0
        request.sampling_params.max_tokens = 1  # vLLM generates no fewer
    if _engine_off is not None:
        request.session_id = str(found) if found else None
        if process_config().response_cache_bytes:  # its answers belong to a tenant
            request.cache_salt = scoped_salt(tenant, request.cache_salt)
        return request
    request.session_id = str(found) if found else _offline_session_id(request)
    request.cache_salt = scoped_salt(tenant, request.cache_salt)
    if request.kv_hints is None:
        request.kv_hints = _hints(turn)
    else:
        _count_unread(request.kv_hints)
    session_affinity.choose(request, turn.opening)
    return request


def _count_unread(hints: KvHintsEnvelope) -> None:
    """Count the wishes of the client's own process that the engine cannot read."""
    actions = getattr(hints, "actions", ())
    retained = [each.payload for each in actions if each.action_type == RETAIN_ACTION]
    if any(hinted_seconds(payload) is None for payload in retained):
        HINT_COUNTS.ignore((HintSource.SESSION_RETAIN,))


def _hints(turn: TurnContext) -> KvHintsEnvelope | None:
    said: list[tuple[str, dict[str, Any]]] = []
    if turn.identity is not None and turn.identity.final:
        said.append((CLOSE_ACTION, {}))
    if turn.wish is not None:
        said.append((RETAIN_ACTION, {"seconds": turn.wish.seconds}))
    if turn.forced_tool is not None:
        said.append((TOOL_ACTION, {"name": turn.forced_tool}))
    if turn.identity is not None and turn.identity.hint.tools:
        said.append((EXPECT_ACTION, {"seconds": dict(turn.identity.hint.tools)}))
    if turn.shape is not Shape.OTHER:
        said.append((SHAPE_ACTION, {"shape": str(turn.shape)}))
    told = {} if turn.identity is None else _said(turn.identity, turn.num_merged).as_payload()
    if told and process_config().explain != "off":
        said.append((TURN_ACTION, told))
    actions = [
        KvHintAction(str(number), action, "1", payload)
        for number, (action, payload) in enumerate(said)
    ]
    return KvHintsEnvelope(HINTS_PROTOCOL, turn.request_id, actions) if actions else None


def _said(identity: TurnIdentity, num_merged: int) -> Said:
    return Said(
        identity.source,
        identity.parent_id,
        identity.compaction,
        identity.rejected,
        identity.retry,
        identity.window,
        num_merged,
    )


def salt_of(headers: Any, cache_salt: str | None) -> str | None:
    """The salt under which the engine knows the sessions of the sender of these headers."""
    identity = resolve_turn(headers, lambda _: None, tenant_isolation=tenant_isolation())
    return scoped_salt(identity.tenant, cache_salt)


def _offline_session_id(request: EngineCoreRequest) -> str | None:
    """The id in ``SamplingParams(extra_args={"session_id": ...})``, for ``LLM`` without HTTP."""
    params = request.sampling_params
    value = (params.extra_args or {}).get("session_id") if params is not None else None
    return value if isinstance(value, str) and value else None
