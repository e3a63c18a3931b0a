# SPDX-License-Identifier: Apache-2.0
"""What is said about a prompt beside its token ids, on the way to the engine core."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np

from vllm_stateful.errors import StatefulError
from vllm_stateful.types import TokenArray

ACTION = "prompt.base"
"""The KV hint action that carries a header; taken off before vLLM sees the request."""

NO_VERSION = 0


class BaseMissError(StatefulError):
    """The engine core does not hold the base of a prompt: it has to be sent in full."""


class ChecksumError(StatefulError):
    """A rebuilt prompt is not the one that was meant (``--stateful-check-invariants``)."""


class PromptHeader(NamedTuple):
    """Which prompt this is, and which one its token ids are to be appended to."""

    client: str
    """Names one API process for its whole life; its versions mean nothing to others."""
    version: int
    """Remember the rebuilt prompt as this version; ``NO_VERSION``: do not."""
    parent: int = NO_VERSION
    """The version that this prompt continues; ``NO_VERSION``: the ids are complete."""
    num_parent_tokens: int = 0
    """Leading tokens of the parent that come before the ids that were sent."""
    parent_ends: bool = False
    """Nobody is expected to continue the parent any more."""
    checksum: int | None = None
    """``checksum`` of the whole prompt, when invariants are checked."""

    def to_payload(self) -> dict[str, Any]:
        """As a JSON-compatible dict."""
        return dict(self._asdict())

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> PromptHeader:
        """The inverse of ``to_payload``. Raises TypeError for unknown or missing fields."""
        return cls(**payload)


def checksum(token_ids: TokenArray) -> int:
    """CRC-32 of int32 token ids."""
    return zlib.crc32(np.ascontiguousarray(token_ids, np.int32).data)
