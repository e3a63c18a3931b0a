# SPDX-License-Identifier: Apache-2.0
"""Stage 0 of a turn: the session and the tenant of an HTTP request, and how long to keep its KV."""

from vllm_stateful.request.opening import opening_of
from vllm_stateful.request.response_chain import ResponseChain
from vllm_stateful.request.retention_wish import RetentionWish, retention_wish
from vllm_stateful.request.session_identity import (
    Source,
    TurnIdentity,
    resolve_turn,
    scoped_salt,
    tenant_of,
)

__all__ = [
    "ResponseChain",
    "RetentionWish",
    "Source",
    "TurnIdentity",
    "opening_of",
    "resolve_turn",
    "retention_wish",
    "scoped_salt",
    "tenant_of",
]
