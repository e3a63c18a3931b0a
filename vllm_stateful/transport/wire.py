# SPDX-License-Identifier: Apache-2.0
"""The names under which two processes say something to each other, beside what vLLM says."""

from __future__ import annotations

# From the API server to the engine core, as actions of vLLM's KV hints.

CLOSE_ACTION = "session.close"
"""The session ends with this turn."""

RETAIN_ACTION = "session.retain"
"""For how long to keep the session; payload ``{"seconds": number}``."""

TOOL_ACTION = "session.tool"
"""Which tool the answer must call; payload ``{"name": string}``. The text of such an answer is the
arguments alone."""

# From the API server to the engine core, as operations of ``EngineCore.stateful``.

TRANSPORT = "transport"
"""Whether the engine core puts prompts together from what is new."""

EPOCH = "epoch"
"""How often the model or its caches have changed."""

# From the engine core to the API server.

BASE_MISS = "stateful.base_miss"
"""``stop_reason`` of the answer of an engine that does not hold the base of a prompt."""
