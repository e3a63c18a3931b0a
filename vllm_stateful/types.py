# SPDX-License-Identifier: Apache-2.0
"""Types that several stages use."""

import re
from array import array
from collections.abc import Hashable
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.int32]
"""Token ids, shape ``[num_tokens]``, int32."""


def token_array(token_ids: list[int]) -> TokenArray:
    """Copy a list of token ids into an int32 array; about 1 ms per 100k tokens."""
    return np.frombuffer(array("i", token_ids), np.int32)


BlockIds = NDArray[np.int32]
"""Physical KV cache block ids in sequence order, shape ``[num_blocks]``, int32."""


SALT_PREFIX = "vllm-stateful."
TENANT_HEX_CHARS = 16
"""The number of hex characters in a tenant's name. A salt that contains the name begins with
``SALT_PREFIX`` (``request.scoped_salt``)."""

_SCOPED_SALT = re.compile(
    rf"{re.escape(SALT_PREFIX)}((?:[0-9a-f]{{{TENANT_HEX_CHARS}}})?)\.[0-9a-f]{{64}}"
)


def tenant_of_salt(cache_salt: str | None) -> str:
    """The tenant in a salt that ``request.scoped_salt`` made.

    This is the name that ``request.tenant_of`` gave; "" for requests without a tenant. It decides
    which residencies count for the same tenant. It never decides what may be reused: for that, the
    whole salt is compared.
    """
    found = _SCOPED_SALT.fullmatch(cache_salt) if isinstance(cache_salt, str) else None
    return found.group(1) if found is not None else ""


class Identity(NamedTuple):
    """What must be equal, beside the tokens, before KV may be reused.

    The model, its revision and the KV dtype are not part of it, because they are constant for the
    life of an engine.
    """

    cache_salt: str | None = None
    """The request's cache salt, which contains the tenant (``request.scoped_salt``)."""
    lora: tuple[Hashable, ...] | None = None
    """Everything that identifies the LoRA adapter (``adapters.model_input``); None for the base
    model."""
    hash_keys: tuple[Hashable, Hashable] = (None, None)
    """What vLLM hashes beside the tokens: with the first block, and with a later block."""

    @property
    def tenant(self) -> str:
        """The tenant whose share this counts for; "" without an API key."""
        return tenant_of_salt(self.cache_salt)


class SessionKey(NamedTuple):
    """The key of one session. The same id with another identity is another session."""

    identity: Identity
    session_id: str


class Shape(StrEnum):
    """What a request is made of (``request.shape``)."""

    TOOLS = "tools"
    """It offers tools, as the turns of agents do."""
    BARE = "bare"
    """It has neither tools nor an earlier answer: a first question, or a request on the side."""
    OTHER = "other"
    """Anything else, or not known."""


class HintSource(StrEnum):
    """Where a hint of a client stood; the label of ``vllm_stateful_hints_ignored_total``."""

    AGENT_HINT = "agent_hint"
    """``X-Agent-Hint``, or a part of it."""
    SESSION_ID = "session_id"
    """A session id that names nothing, in any header or field."""
    SESSION_FINAL = "session_final"
    """``x-dynamo-session-final``."""
    COMPACTION = "compaction"
    """``x-codex-turn-metadata`` or ``x-deepseek-harness-compact``."""
    RETRY = "retry"
    """``X-Stainless-Retry-Count``."""
    WINDOW = "window"
    """``x-codex-window-id``."""
    CACHE_CONTROL = "cache_control"
    """A breakpoint in the body."""
    CACHE_RETENTION = "prompt_cache_retention"
    CACHE_OPTIONS = "prompt_cache_options"
    """Its ``ttl``."""
    SESSION_RETAIN = "session_retain"
    """The KV hint ``session.retain``."""


class Outcome(StrEnum):
    """How a turn found its context; the label of ``vllm_stateful_turns_total``."""

    RESUMED = "resumed"
    """It continued at the last computed token of its session."""
    FORKED = "forked"
    """It started on the KV of another session (of the same tenant) that shares its prefix."""
    DIVERGED = "diverged"
    """Its history was edited. KV was reused up to the first differing token."""
    RESTORED = "restored"
    """Its KV, or the end of it, was loaded from vLLM's offload tier."""
    CACHED = "cached"
    """No session holds its prefix, but vLLM's own prefix cache had some of it, or had more."""
    COLD = "cold"
    """Nothing of it was there."""
    BYPASSED = "bypassed"
    """Stock vLLM served it; ``Bypass`` says why."""


class Bypass(StrEnum):
    """Why a turn was left to stock vLLM."""

    MULTIMODAL = "multimodal"
    """One of its images or sounds has too few tokens to be distinguished from others."""
    PROMPT_EMBEDS = "prompt_embeds"
    PROMPT_LOGPROBS = "prompt_logprobs"
    NO_CACHE_READ = "skip_reading_prefix_cache"
    """It asks not to read the cache, and does not ask for the log-probabilities of its prompt."""
    POOLING = "pooling"
    STREAMING_INPUT = "streaming_input"
    PREFIX_CACHING_OFF = "prefix_caching_off"


class Demotion(StrEnum):
    """Why a residency gave its blocks back; the label of ``vllm_stateful_demotions_total``."""

    PRESSURE = "pressure"
    """An allocation was refused and needed its blocks."""
    BUDGET = "budget"
    """The pinned blocks exceeded ``--stateful-pin-fraction``."""
    IDLE = "idle"
    """It was not used for ``--stateful-idle-seconds``."""
    SUPERSEDED = "superseded"
    """A newer turn of the session holds everything that it held, or replaced it."""
    PREEMPTED = "preempted"
    """Its turn was preempted by vLLM."""
    RESET = "reset"
    """``reset_prefix_cache``, sleep or a weight update."""
    ERROR = "error"
    """An error during generation."""
    CLOSED = "closed"
    """The session was closed by its client."""
