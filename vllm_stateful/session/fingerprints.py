# SPDX-License-Identifier: Apache-2.0
"""Keeps fingerprints of recent requests by their responses, bounded in number, bytes and age."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import NamedTuple

from vllm_stateful.session.fingerprint import Change, Fingerprint, compare

MAX_REQUESTS = 20_000
MAX_BYTES = 32 << 20
MAX_AGE_S = 3600.0
MAX_RESPONSES_BACK = 1000
"""The most responses for which a chain of ``previous_response_id`` is followed."""

BYTES_PER_TOKEN = 4
"""The estimate that is used where the tokens of a prompt were not counted."""


class Remembered(NamedTuple):
    """An earlier request.

    Attributes:
        fingerprint: the fingerprint of its body.
        num_prompt: the number of tokens in its prompt; 0 where they were not counted.
        at_s: when it was answered, in seconds.
    """

    fingerprint: Fingerprint
    num_prompt: int
    at_s: float

    @property
    def num_tokens(self) -> int:
        """The number of tokens in its prompt, estimated where they were not counted."""
        return self.num_prompt or self.fingerprint.num_request // BYTES_PER_TOKEN


def key_of(api: str, tenant: str, cache_salt: str, response_id: str) -> bytes:
    """The key under which a request is remembered: its API, its owner and its response."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (api, tenant, cache_salt, response_id):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


class Fingerprints:
    """Remembers requests by `key_of`, and drops the least recently used first. Not thread-safe.

    Args:
        max_requests: the most requests that are remembered.
        max_bytes: the most bytes of memory that they may take.
        max_age_s: the seconds for which a request is remembered.
    """

    def __init__(
        self,
        max_requests: int = MAX_REQUESTS,
        max_bytes: int = MAX_BYTES,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._requests: OrderedDict[bytes, Remembered] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._requests)

    def keep(self, key: bytes, fingerprint: Fingerprint, num_prompt: int, now_s: float) -> None:
        """Remember a request that was answered.

        Args:
            key: see `key_of`.
            fingerprint: the fingerprint of the request.
            num_prompt: the number of tokens in its prompt; 0 where they were not counted.
            now_s: the time now, in seconds.
        """
        self._drop(key)
        self._requests[key] = Remembered(fingerprint, num_prompt, now_s)
        self.num_bytes += fingerprint.num_bytes
        while len(self._requests) > self._max_requests or self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._requests)))

    def find(self, key: bytes, now_s: float) -> Remembered | None:
        """An earlier request; None where it is not remembered, or not any more."""
        found = self._requests.get(key)
        if found is None:
            return None
        if now_s - found.at_s > self._max_age_s:
            self._drop(key)
            return None
        self._requests.move_to_end(key)
        return found

    def compare_with(
        self, key: bytes, before: Remembered, now: Fingerprint, now_s: float
    ) -> Change | None:
        """The first difference between an earlier request and this one.

        Args:
            key: the key of the earlier request.
            before: the earlier request.
            now: the fingerprint of this request.
            now_s: the time now, in seconds.
        """
        grew = None
        if now.previous != before.fingerprint.previous:
            grew = self._goes_on_behind(key, now, now_s)
        return compare(before.fingerprint, now, grew=grew)

    def _goes_on_behind(self, key: bytes, now: Fingerprint, now_s: float) -> bool:
        """Whether the chain of earlier responses is known to lead back to a request."""
        previous = now.previous
        for _ in range(MAX_RESPONSES_BACK):
            if previous == key:
                return True
            found = self.find(previous, now_s) if previous else None
            if found is None:
                return False
            previous = found.fingerprint.previous
        return False

    def _drop(self, key: bytes) -> None:
        gone = self._requests.pop(key, None)
        if gone is not None:
            self.num_bytes -= gone.fingerprint.num_bytes
