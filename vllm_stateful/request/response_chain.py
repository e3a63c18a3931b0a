# SPDX-License-Identifier: Apache-2.0
"""Finds the session of a turn of the Responses API, which names the response before it."""

from collections import OrderedDict
from dataclasses import replace

from vllm_stateful.request.client_signs import has_control_characters
from vllm_stateful.request.session_identity import (
    MAX_ID_CHARS,
    TurnIdentity,
)

DEFAULT_MAX_RESPONSES = 65_536
_SESSION_PREFIX = "previous-response-id:"


class ResponseChain:
    """Remembers for each tenant which session a response belongs to. Bounded in size.

    The least recently used response is forgotten first. This costs only time: the next turn then
    starts a session of its own. Not thread-safe; use it from the event loop.

    max_responses: the number of responses that are remembered. Raises ValueError below 1.
    """

    def __init__(self, max_responses: int = DEFAULT_MAX_RESPONSES) -> None:
        if max_responses < 1:
            raise ValueError(f"max_responses must be at least 1, got {max_responses}")
        self.max_responses = max_responses
        self._sessions: OrderedDict[tuple[str, str], str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def record(self, tenant: str, response_id: str, session_id: str) -> None:
        """Remember that this response belongs to this session."""
        key = (tenant, response_id)
        self._sessions[key] = session_id
        self._sessions.move_to_end(key)
        if len(self._sessions) > self.max_responses:
            self._sessions.popitem(last=False)

    def lookup(self, tenant: str, response_id: str) -> str | None:
        """The session of a response of the same tenant; None when it is not known."""
        key = (tenant, response_id)
        session_id = self._sessions.get(key)
        if session_id is not None:
            self._sessions.move_to_end(key)
        return session_id

    def resolve(
        self,
        identity: TurnIdentity,
        previous_response_id: object,
        response_id: object,
        *,
        stored: bool = True,
    ) -> TurnIdentity:
        """Complete an identity from the chain of responses, and add this response to the chain.

        A session that the client named in another way is kept. Otherwise the session is that of the
        previous response. If the previous response is unknown, or there is none, a new chain starts
        with the session id "previous-response-id:<first response id known>".

        stored: False when the server does not keep this response (`store: false`, or vLLM's
            response store is off). No later turn can name such a response, so it starts no chain,
            and the session is derived from content.

        Raises nothing for any id. An id that is not a string of 1 to 256 characters is ignored.
        """
        previous = _response_id(previous_response_id)
        current = _response_id(response_id) if stored else None
        if identity.session_id is None:
            session_id = self._session_of(identity.tenant, previous, current)
            if session_id is None:
                return identity
            identity = replace(identity, session_id=session_id, source="previous-response-id")
        if current is not None and identity.session_id is not None:
            self.record(identity.tenant, current, identity.session_id)
        return identity

    def _session_of(self, tenant: str, previous: str | None, current: str | None) -> str | None:
        if previous is None:
            return None if current is None else _SESSION_PREFIX + current
        session_id = self.lookup(tenant, previous)
        if session_id is None:
            session_id = _SESSION_PREFIX + previous
            self.record(tenant, previous, session_id)
        return session_id


def _response_id(value: object) -> str | None:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID_CHARS:
        return None
    return None if has_control_characters(value) else value
