# SPDX-License-Identifier: Apache-2.0
"""API process: says in the header ``X-Session-ID`` of an answer which conversation it belongs to.

It is the id that the client itself sent, in whichever header or field. For a conversation that no
client named it is an id made from how the conversation begins (``request.conversation_id``). A
client that sends this id back names its session, and a router can send its turns to one replica.

``identify`` notes the id, and a middleware puts it into the answer. Where a request fails before it
is identified, the answer has the id that the request has in its headers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers

from vllm_stateful.request import (
    GATEWAY_COOKIE,
    ResponseChain,
    TurnIdentity,
    conversation_id,
    id_as_sent,
    id_instead_of,
    resolve_turn,
)

HEADER = b"x-session-id"
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")

_EXPOSE = (b"access-control-expose-headers", b"X-Session-ID")
_STATE = "stateful_session_header"
_SENDABLE = re.compile(r"[!-~](?:[ -~]*[!-~])?")

_made = ResponseChain()
"""The ids that were made for stored responses. A turn that names one gets the same id."""


def note(raw_request: Any | None, request: Any, body: dict[str, Any], found: TurnIdentity) -> None:
    """Note the id for the answer to an HTTP request. Only its first turn counts.

    Args:
        raw_request: the HTTP request, or None when there is none.
        request: vLLM's parsed request.
        body: the JSON body as the client sent it.
        found: the session and the tenant of the turn.
    """
    if raw_request is None or hasattr(raw_request.state, _STATE):
        return
    shown = _named(found)
    if shown is None and not _has_cookie(found):
        shown = _made_id(request, body, found)
    setattr(raw_request.state, _STATE, shown)


def _named(found: TurnIdentity) -> str | None:
    """The client's own id, or one made from it where it cannot stand in a header."""
    name = None if _has_cookie(found) else id_as_sent(found)
    if name is None or _SENDABLE.fullmatch(name):
        return name
    return id_instead_of(name, found.tenant)


def _has_cookie(found: TurnIdentity) -> bool:
    """Whether a gateway uses this header for the name of a server. It is then left to it."""
    return GATEWAY_COOKIE in (found.rejected or "")


def _made_id(request: Any, body: dict[str, Any], found: TurnIdentity) -> str | None:
    previous = body.get("previous_response_id")
    shown = _made.lookup(found.tenant, previous) if isinstance(previous, str) else None
    if shown is None and found.session_id is not None and previous is not None:
        shown = id_instead_of(found.session_id, found.tenant)
    if shown is None:
        shown = conversation_id(body, found.tenant)
    if shown is not None and getattr(request, "store", False):
        response_id = getattr(request, "request_id", None)
        if found.source == "previous-response-id" and isinstance(response_id, str):
            _made.record(found.tenant, response_id, shown)
    return shown


class SessionHeader:
    """ASGI middleware that adds the header to the answers of the routes that generate.

    Args:
        app: the application.
        is_on: whether the plugin keeps sessions. It is asked for each answer.
        is_tenant_by_key: whether the API key separates tenants.
    """

    def __init__(
        self, app: Any, is_on: Callable[[], bool], is_tenant_by_key: Callable[[], bool]
    ) -> None:
        self.app = app
        self._is_on = is_on
        self._is_tenant_by_key = is_tenant_by_key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass everything on; add to the headers of an answer."""

        async def send_named(message: Any) -> None:
            if message["type"] == "http.response.start" and self._is_on():
                message = {**message, "headers": self._headers(scope, message["headers"])}
            await send(message)

        is_ours = scope["type"] == "http" and scope["method"] == "POST"
        await self.app(scope, receive, send_named if is_ours else send)

    def _headers(self, scope: Any, stock: Any) -> Any:
        headers = list(stock)
        shown = self._id_of(scope)
        if shown is None or any(bytes(name).lower() == HEADER for name, _ in headers):
            return headers
        is_browser = any(bytes(name).lower() == b"origin" for name, _ in scope["headers"])
        return [*headers, (HEADER, shown.encode("ascii")), *([_EXPOSE] if is_browser else [])]

    def _id_of(self, scope: Any) -> str | None:
        state = scope.get("state") or {}
        if _STATE in state:
            noted: str | None = state[_STATE]
            return noted
        if not scope["path"].endswith(PATHS):
            return None
        headers = Headers(scope=scope)
        by_key = self._is_tenant_by_key()
        return _named(resolve_turn(headers, lambda _: None, tenant_isolation=by_key))
