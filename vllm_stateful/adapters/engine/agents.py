# SPDX-License-Identifier: Apache-2.0
"""Which agent's answers a turn may be drafted from, and what its request says about drafts."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

from vllm.v1.request import Request

from vllm_stateful.adapters.engine.turn import Turn
from vllm_stateful.config import parse_bool
from vllm_stateful.prefix.boundaries import BoundaryRules, Kind

XARG = "stateful_drafts"
"""``vllm_xargs`` of a request: 0 for no drafts; 1 for drafts that are worth it for this request
alone, whatever they cost the others."""


LOOK_FOR_USER = 32_768
"""Tokens in which the first user message is looked for: before it is what makes the agent."""

OPENING = 32
"""Tokens that make the agent where no message is known to begin."""


def agent_of(turn: Turn, rules: BoundaryRules | None) -> Hashable:
    """Tenant, adapter, and all that stands before the first user message.

    Args:
        turn: of the agent.
        rules: where messages begin in token ids; None when that is not known.
    """
    opening = turn.prompt[:OPENING]
    if rules is not None:
        head = turn.prompt[:LOOK_FOR_USER]
        cuts = rules.cuts(head, 0, Kind.OTHER)
        users = cuts.starts[cuts.kinds == Kind.USER]
        opening = head[: int(users[0])] if len(users) else opening
    return turn.session.identity, hashlib.blake2b(opening.tobytes(), digest_size=16).digest()


def wish_of(request: Request) -> bool | None:
    """Whether a request asks for drafts or against them; what cannot be read asks for none."""
    value = (request.sampling_params.extra_args or {}).get(XARG)
    if value is None:
        return None
    try:
        return parse_bool(str(value))
    except ValueError:
        return False
