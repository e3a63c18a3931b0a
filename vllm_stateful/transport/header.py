# SPDX-License-Identifier: Apache-2.0
"""The header that goes to the engine core with the token ids of a prompt."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np

from vllm_stateful.errors import StatefulError
from vllm_stateful.types import TokenArray

ACTION = "prompt.base"
"""The KV hint action that carries a header. It is removed before vLLM sees the request."""

NO_VERSION = 0


class BaseMissError(StatefulError):
    """The engine core does not hold the base of a prompt. The prompt must be sent in full."""


class ChecksumError(StatefulError):
    """A rebuilt prompt differs from the one that was sent (``--stateful-check-invariants``)."""


class PromptHeader(NamedTuple):
    """Which prompt this is, and to which earlier prompt its token ids are appended."""

    client: str
    """The name of the API process. Versions are numbered per API process."""
    version: int
    """The version under which to remember the rebuilt prompt; ``NO_VERSION``: do not remember
    it."""
    parent: int = NO_VERSION
    """The version that this prompt continues; ``NO_VERSION``: the ids that were sent are
    complete."""
    num_parent_tokens: int = 0
    """Leading tokens of the parent that come before the ids that were sent."""
    parent_ends: bool = False
    """Whether nobody is expected to continue the parent any more."""
    checksum: int | None = None
    """The ``checksum`` of the whole prompt, when invariants are checked."""

    def to_payload(self) -> dict[str, Any]:
        """The header as a JSON-compatible dict."""
        return dict(self._asdict())

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> PromptHeader:
        """The inverse of ``to_payload``. Raises TypeError for unknown or missing fields."""
        return cls(**payload)


def checksum(token_ids: TokenArray) -> int:
    """CRC-32 of int32 token ids."""
    return zlib.crc32(np.ascontiguousarray(token_ids, np.int32).data)
