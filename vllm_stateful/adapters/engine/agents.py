# SPDX-License-Identifier: Apache-2.0
"""The agent whose answers a turn may be drafted from, and the request's own wish about drafts."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

from vllm.v1.request import Request

from vllm_stateful.adapters.engine.turn import Turn
from vllm_stateful.config import parse_bool
from vllm_stateful.prefix.boundaries import BoundaryRules, Kind

XARG = "stateful_drafts"
"""The key in a request's ``vllm_xargs``. 0 asks for no drafts. 1 asks for all drafts that are worth
it for this request alone, whatever they cost other requests."""


LOOK_FOR_USER = 32_768
"""Leading tokens in which the first user message is looked for. What is before it makes the
agent."""

OPENING = 32
"""Leading tokens that make the agent when no user message is found."""


def agent_of(turn: Turn, rules: BoundaryRules | None) -> Hashable:
    """A key of the agent: its tenant, its adapter, and all tokens before the first user message.

    Args:
        turn: a turn of the agent.
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
    """Whether a request asks for drafts (True) or against them (False); None without a wish.

    A value that cannot be read counts as a wish for none.
    """
    value = (request.sampling_params.extra_args or {}).get(XARG)
    if value is None:
        return None
    try:
        return parse_bool(str(value))
    except ValueError:
        return False
