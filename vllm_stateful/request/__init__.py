# SPDX-License-Identifier: Apache-2.0
"""Stage 0 of a turn: the session and the tenant of an HTTP request, and how long to keep its KV."""

from vllm_stateful.request.conversation_id import conversation_id, id_instead_of
from vllm_stateful.request.opening import opening_of
from vllm_stateful.request.response_chain import ResponseChain
from vllm_stateful.request.retention_wish import RetentionWish, retention_wish
from vllm_stateful.request.session_identity import (
    GATEWAY_COOKIE,
    Source,
    TurnIdentity,
    id_as_sent,
    resolve_turn,
    scoped_salt,
    tenant_of,
)

__all__ = [
    "GATEWAY_COOKIE",
    "ResponseChain",
    "RetentionWish",
    "Source",
    "TurnIdentity",
    "conversation_id",
    "id_as_sent",
    "id_instead_of",
    "opening_of",
    "resolve_turn",
    "retention_wish",
    "scoped_salt",
    "tenant_of",
]
