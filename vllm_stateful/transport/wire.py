# SPDX-License-Identifier: Apache-2.0
"""The names of the messages that the plugin's processes send to each other through vLLM."""

from __future__ import annotations

# From the API server to the engine core, as actions of vLLM's KV hints.

CLOSE_ACTION = "session.close"
"""The session ends with this turn."""

RETAIN_ACTION = "session.retain"
"""How long to keep the session; payload ``{"seconds": number}``."""

TOOL_ACTION = "session.tool"
"""The tool that the answer must call; payload ``{"name": string}``. The text of such an answer is
only the arguments."""

EXPECT_ACTION = "session.expect"
"""How long tools are expected to take; payload ``{"seconds": {name: number}}``."""

SHAPE_ACTION = "session.shape"
"""What the request is made of; payload ``{"shape": string}``, a ``types.Shape``. Not sent for
``Shape.OTHER``."""

TURN_ACTION = "session.turn"
"""What the client said of its turn, for the record only (``session.Said``); the payload has its
fields, those that are not empty."""

HINTS_PROTOCOL = "vllm-stateful/1"
"""The protocol version of KV hints that hold these actions."""

# From the API server to the engine core, as operations of the utility call ``stateful``, which the
# patch `engine-utility` adds. ``adapters.engine.engine_utility`` answers the first two itself, and
# ``adapters.engine.session_operations`` the others.

TRANSPORT = "transport"
"""Asks whether the engine core rebuilds prompts from a base and the new token ids."""

EPOCH = "epoch"
"""Asks how often the model or its caches have changed."""

STATS, CLOSE, SESSIONS, SESSION, TURNS, TURN = (
    "stats",
    "close",
    "sessions",
    "session",
    "turns",
    "turn",
)
"""Asks for all totals; closes sessions; asks for sessions, one of them, turns, one of them."""

ENDED = "ended"
"""Takes the turns that have ended since the last question, where turns are traced."""

# From the engine core to the API server.

BASE_MISS = "stateful.base_miss"
"""The ``stop_reason`` of an answer when the engine core does not hold the base of the prompt."""
