# SPDX-License-Identifier: Apache-2.0
"""Types that several stages share."""

from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.int32]
"""Token ids, shape ``[num_tokens]``, int32."""

BlockIds = NDArray[np.int32]
"""Physical KV cache block ids in sequence order, shape ``[num_blocks]``, int32."""


class Identity(NamedTuple):
    """What must be equal, beside the tokens, before KV may be reused.

    The model, its revision and the KV dtype are constant for the life of an engine and
    therefore not part of it.
    """

    cache_salt: str | None = None
    """The request's cache salt; the tenant is folded into it (``api.scoped_salt``)."""
    lora: tuple[str, int, str] | None = None
    """Name, integer id and path of the LoRA adapter, or None for the base model."""


class SessionKey(NamedTuple):
    """One session of one tenant. The same id under another identity is another session."""

    identity: Identity
    session_id: str


class Outcome(StrEnum):
    """How a turn found its context; the label of ``vllm_stateful_turns_total``."""

    RESUMED = "resumed"
    """Continued at the last computed token of this session."""
    FORKED = "forked"
    """Started on the KV of another session (same tenant) that shares its prefix."""
    DIVERGED = "diverged"
    """The history was edited: reused up to the first differing token."""
    RESTORED = "restored"
    """Its KV, or the end of it, was loaded from vLLM's offload tier."""
    COLD = "cold"
    """No session holds its prefix; vLLM's own prefix cache may still have hit."""
    BYPASSED = "bypassed"
    """Served by stock vLLM; see the reason label."""


class Bypass(StrEnum):
    """Why a turn was left to stock vLLM."""

    MULTIMODAL = "multimodal"
    PROMPT_EMBEDS = "prompt_embeds"
    PROMPT_LOGPROBS = "prompt_logprobs"
    POOLING = "pooling"
    STREAMING_INPUT = "streaming_input"
    PREFIX_CACHING_OFF = "prefix_caching_off"


class Demotion(StrEnum):
    """Why a residency gave its blocks back; the label of ``vllm_stateful_demotions_total``."""

    PRESSURE = "pressure"
    """An allocation was refused and needed its blocks."""
    BUDGET = "budget"
    """Pinned blocks exceeded ``--stateful-pin-fraction``."""
    IDLE = "idle"
    """Not used for ``--stateful-idle-seconds``."""
    SUPERSEDED = "superseded"
    """A newer turn of the session holds everything it held, or replaced it."""
    PREEMPTED = "preempted"
    """Its turn was preempted by vLLM."""
    RESET = "reset"
    """``reset_prefix_cache``, sleep, a weight update, or an error during generation."""
    CLOSED = "closed"
    """The session was closed by its client."""
