# SPDX-License-Identifier: Apache-2.0
"""Types that several stages share."""

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
"""A tenant's name, and how a salt begins that holds one (``request.scoped_salt``)."""

_SCOPED_SALT = re.compile(
    rf"{re.escape(SALT_PREFIX)}((?:[0-9a-f]{{{TENANT_HEX_CHARS}}})?)\.[0-9a-f]{{64}}"
)


def tenant_of_salt(cache_salt: str | None) -> str:
    """The tenant of a salt, read back from what ``request.scoped_salt`` made.

    The name that ``request.tenant_of`` gave; "" for all that was sent without one.
    It says who shares with whom, never what may be reused: that takes the whole salt.
    """
    found = _SCOPED_SALT.fullmatch(cache_salt) if isinstance(cache_salt, str) else None
    return found.group(1) if found is not None else ""


class Identity(NamedTuple):
    """What must be equal, beside the tokens, before KV may be reused.

    The model, its revision and the KV dtype are constant for the life of an engine and
    therefore not part of it.
    """

    cache_salt: str | None = None
    """The request's cache salt; the tenant is folded into it (``request.scoped_salt``)."""
    lora: tuple[Hashable, ...] | None = None
    """All that names the LoRA adapter (``adapters.model_input``), or None for the base model."""
    hash_keys: tuple[Hashable, Hashable] = (None, None)
    """What vLLM hashes beside the tokens, with the first block and with a later one."""

    @property
    def tenant(self) -> str:
        """The name under which shares are counted; "" without an API key."""
        return tenant_of_salt(self.cache_salt)


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
    """One of its images or sounds is too short to be told from others."""
    PROMPT_EMBEDS = "prompt_embeds"
    PROMPT_LOGPROBS = "prompt_logprobs"
    NO_CACHE_READ = "skip_reading_prefix_cache"
    """It asks not to use what is cached, and not for the log-probabilities of its prompt."""
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
    """``reset_prefix_cache``, sleep or a weight update."""
    ERROR = "error"
    """An error during generation."""
    CLOSED = "closed"
    """The session was closed by its client."""
