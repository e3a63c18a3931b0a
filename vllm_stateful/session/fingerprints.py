# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of recent requests by their responses. Bounded in number, bytes and age."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import NamedTuple

from vllm_stateful.session.fingerprint import Change, Fingerprint, compare

MAX_REQUESTS = 20_000
MAX_BYTES = 32 << 20
MAX_AGE_S = 3600.0
MAX_RESPONSES_BACK = 1000
"""So far the chain of ``previous_response_id`` is followed."""

BYTES_PER_TOKEN = 4
"""Where nobody counted the tokens of a prompt."""


class Remembered(NamedTuple):
    """An earlier request.

    Attributes:
        fingerprint: of its body.
        num_prompt: tokens of its prompt; 0 where nobody counted them.
        at_s: when it was answered.
    """

    fingerprint: Fingerprint
    num_prompt: int
    at_s: float

    @property
    def num_tokens(self) -> int:
        """Tokens of its prompt, estimated where nobody counted them."""
        return self.num_prompt or self.fingerprint.num_request // BYTES_PER_TOKEN


def key_of(api: str, tenant: str, cache_salt: str, response_id: str) -> bytes:
    """Under what a request is remembered: whose it is, and which response it got."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (api, tenant, cache_salt, response_id):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


class Fingerprints:
    """Requests by `key_of`; the least recently used goes first. Not thread-safe.

    Args:
        max_requests: requests that are remembered.
        max_bytes: the memory that they may take.
        max_age_s: for how long, in seconds.
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
            fingerprint: of the request.
            num_prompt: tokens of its prompt; 0 where nobody counted them.
            now_s: a clock.
        """
        self._drop(key)
        self._requests[key] = Remembered(fingerprint, num_prompt, now_s)
        self.num_bytes += fingerprint.num_bytes
        while len(self._requests) > self._max_requests or self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._requests)))

    def find(self, key: bytes, now_s: float) -> Remembered | None:
        """An earlier request; None where it is not known, or not any more."""
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
            key: of the earlier request.
            before: the earlier request.
            now: this one.
            now_s: a clock.
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
