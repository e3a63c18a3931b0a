# SPDX-License-Identifier: Apache-2.0
"""API process: which session and tenant a request belongs to, carried to the engine.

vLLM asks for a session id once per HTTP request, just before it hands the prompt to the engine.
What is found then rides on the answer: a ``str`` that knows its `TurnContext`. As the
``EngineCoreRequest`` is made, it is put on that: the session in ``session_id``, the tenant folded
into ``cache_salt`` (so that vLLM's own block hashes keep tenants apart too), the end of a session
and the wish to keep it as KV hints. A context variable set where vLLM asks would not do: vLLM runs
a handler in a task of its own, and the request of a streamed response is made in another. Routes
that never ask for a session id (token-in-token-out and others) get their tenant from
``TenantMiddleware``, which is outside both.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from starlette.datastructures import Headers
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

from vllm_stateful.adapters.frontend import cache_diagnostics, session_affinity
from vllm_stateful.adapters.frontend.sent_body import digest_of_tools, sent_body, wish_of
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
from vllm_stateful.request import (
    ResponseChain,
    TurnIdentity,
    resolve_turn,
    scoped_salt,
    tenant_of,
)
from vllm_stateful.request.session_identity import id_fault
from vllm_stateful.session import Said
from vllm_stateful.transport.wire import (
    CLOSE_ACTION,
    HINTS_PROTOCOL,
    RETAIN_ACTION,
    TOOL_ACTION,
    TURN_ACTION,
)
from vllm_stateful.types import SALT_PREFIX

MAX_TOOL_CHARS = 128
"""A longer name of a tool is not sent on."""

_responses = ResponseChain()


class IdentifiedSession(str):
    """A session id on its way through vLLM's API process; empty when there is none."""

    __slots__ = ("turn",)
    turn: TurnContext

    @classmethod
    def of(cls, session_id: str | None, turn: TurnContext) -> IdentifiedSession:
        made = cls(session_id or "")
        made.turn = turn
        return made


class TenantMiddleware:
    """ASGI middleware that remembers, for one HTTP request, whose it is and what it allows."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass everything on untouched."""
        if scope["type"] in ("http", "websocket"):
            begin_http(Headers(scope=scope))
        await self.app(scope, receive, send)


def begin_http(headers: Headers) -> None:
    """An HTTP request begins: read from its headers whose it is and what it allows."""
    begin(
        tenant_of(headers) if tenant_isolation() else "",
        CacheControl.of(headers) if process_config().response_cache_bytes else None,
    )


def owned_name(name: str, cache_salt: str | None) -> str:
    """A client's own name (``uuid``) of an image, sound or video in the prompt being rendered.

    vLLM keeps what it is given under such a name, and takes it from there when the name comes
    again. Two tenants may give one name to two pictures, and one may guess another's.

    Args:
        name: any text.
        cache_salt: of the request.
    """
    owner = None if _engine_off is not None else scoped_salt(current().tenant, cache_salt)
    if owner is None:
        return name
    parts = (f"{len(owner)}:{owner}", name)
    digest = hashlib.sha256("".join(parts).encode("utf-8", "surrogatepass")).digest()
    return SALT_PREFIX + digest.hex()


_engine_off: str | None = None


def stand_aside(reason: str | None) -> None:
    """Send requests to the engine as they came, for it serves as stock vLLM; None: it does not.

    Without sessions a salt by API key would only divide the prefix cache. It stays where the
    response cache is on, whose answers are found by it.
    """
    global _engine_off
    _engine_off = reason


def tenant_isolation() -> bool:
    """Whether the API key separates tenants (``--stateful-tenant``)."""
    return process_config().tenant == "api-key"


def identify(request: Any, raw_request: Any | None, stock: str | None) -> IdentifiedSession:
    """Hook of ``session-identity``: the session id that the engine is told, and whose it is.

    Args:
        request: vLLM's parsed chat, completion or responses request. Made from an Anthropic
            request it lacks fields (``metadata``): these are read from the body.
        raw_request: the HTTP request, or None when there is none.
        stock: the id that vLLM itself found.
    """
    as_sent = stock
    headers = {} if raw_request is None else raw_request.headers
    body = sent_body(raw_request)

    def field(name: str) -> object:
        value = getattr(request, name, None)
        return body.get(name) if value is None else value

    identity = resolve_turn(headers, field, tenant_isolation=tenant_isolation())
    if hasattr(request, "previous_response_id"):
        identity = _responses.resolve(
            identity,
            request.previous_response_id,
            getattr(request, "request_id", None),
            stored=bool(getattr(request, "store", False)),
        )
    salt = field("cache_salt")
    cache_diagnostics.begin(
        raw_request,
        body,
        (identity.tenant, salt if isinstance(salt, str) else ""),
        is_on=_engine_off is None and process_config().explain != "off",
    )
    if identity.session_id is None and stock is not None and id_fault(stock) is None:
        stock = None  # a gateway's cookie: it names a server
    here = current()
    turn = replace(
        here,
        identity=identity,
        wish=wish_of(raw_request),
        plan=plan_of(request, raw_request),
        tools=b"" if here.cache_control is None else digest_of_tools(body),
        opening=session_affinity.opening(raw_request),
        forced_tool=_forced_tool(getattr(request, "tool_choice", None)),
        request_id="",
    )
    session_id = (identity.session_id or stock) if _engine_off is None else as_sent
    return IdentifiedSession.of(session_id, turn)


def _forced_tool(choice: Any) -> str | None:
    """The function that ``tool_choice`` names, in a chat or a responses request."""
    if getattr(choice, "type", None) != "function":
        return None
    name = getattr(getattr(choice, "function", choice), "name", None)
    return name if isinstance(name, str) and len(name) <= MAX_TOOL_CHARS else None


def stamp(request: EngineCoreRequest) -> EngineCoreRequest:
    """Hook of ``request-identity``: tenant, end of session and wish, on the request to the engine.

    And which engine core it goes to, where there are several.

    Hints that it has already, from the client's own process, are kept as they are.
    """
    found = request.session_id
    identified = found.turn if isinstance(found, IdentifiedSession) else NOTHING_KNOWN
    turn = enter(identified, request.request_id)
    tenant = turn.tenant if turn.identity is None else turn.identity.tenant
    if _engine_off is not None:
        request.session_id = str(found) if found else None
        if process_config().response_cache_bytes:  # its answers belong to a tenant
            request.cache_salt = scoped_salt(tenant, request.cache_salt)
        return request
    request.session_id = str(found) if found else _offline_session_id(request)
    request.cache_salt = scoped_salt(tenant, request.cache_salt)
    if request.kv_hints is None:
        request.kv_hints = _hints(turn)
    session_affinity.choose(request, turn.opening)
    return request


def _hints(turn: TurnContext) -> KvHintsEnvelope | None:
    said: list[tuple[str, dict[str, Any]]] = []
    if turn.identity is not None and turn.identity.final:
        said.append((CLOSE_ACTION, {}))
    if turn.wish is not None:
        said.append((RETAIN_ACTION, {"seconds": turn.wish.seconds}))
    if turn.forced_tool is not None:
        said.append((TOOL_ACTION, {"name": turn.forced_tool}))
    told = {} if turn.identity is None else _said(turn.identity).as_payload()
    if told and process_config().explain != "off":
        said.append((TURN_ACTION, told))
    actions = [
        KvHintAction(str(number), action, "1", payload)
        for number, (action, payload) in enumerate(said)
    ]
    return KvHintsEnvelope(HINTS_PROTOCOL, turn.request_id, actions) if actions else None


def _said(identity: TurnIdentity) -> Said:
    return Said(
        identity.source,
        identity.parent_id,
        identity.compaction,
        identity.rejected,
        identity.retry,
        identity.window,
    )


def salt_of(headers: Any, cache_salt: str | None) -> str | None:
    """The salt under which the engine knows the sessions of whoever sent these headers."""
    identity = resolve_turn(headers, lambda _: None, tenant_isolation=tenant_isolation())
    return scoped_salt(identity.tenant, cache_salt)


def _offline_session_id(request: EngineCoreRequest) -> str | None:
    """``SamplingParams(extra_args={"session_id": ...})``, for ``LLM.generate`` and ``LLM.chat``."""
    params = request.sampling_params
    value = (params.extra_args or {}).get("session_id") if params is not None else None
    return value if isinstance(value, str) and value else None
