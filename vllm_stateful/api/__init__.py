# SPDX-License-Identifier: Apache-2.0
"""Stage 0 of a turn: which session, and which tenant, an HTTP request belongs to."""

from vllm_stateful.api.response_chain import ResponseChain
from vllm_stateful.api.session_identity import (
    Source,
    TurnIdentity,
    resolve_turn,
    scoped_salt,
    tenant_of,
)

__all__ = [
    "ResponseChain",
    "Source",
    "TurnIdentity",
    "resolve_turn",
    "scoped_salt",
    "tenant_of",
]
