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

# Inside the engine core, as attributes of vLLM's ``Request``.

PROMPT_ARRAY = "stateful_prompt_array"
"""Its prompt: int32, shape ``[num_tokens]``."""

PROMPT_NAMES = "stateful_prompt_names"
"""The version and the ``PromptBase`` of its prompt, where it came with a header."""

WORKER_ARRAY = "stateful_worker_array"
"""The same array as ``PROMPT_ARRAY``, where the worker may be given it in place of the list."""

# From the engine core to the workers, as attributes of vLLM's ``SchedulerOutput``.

LOOKUP = "stateful_lookup"
"""A ``LookupUpdate`` for the device, if there is one."""

SHARED_KEYS = "stateful_shared_keys"
"""A tuple of ``SharedKeys``, if there are any."""
