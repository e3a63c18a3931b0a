# SPDX-License-Identifier: Apache-2.0
"""A prompt's token ids that remember which earlier prompt they continue."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

DIGEST_TOKENS = 4096
"""Tokens per chunk. A prompt's digest is made from digests of its chunks, so a later prompt can use
those of the chunks that it shares."""


class LastPlace(NamedTuple):
    """The last occurrence of a token among the first ``num_seen`` tokens; -1 for none."""

    place: int
    num_seen: int

    def within(self, num_tokens: int) -> LastPlace | None:
        """The last occurrence among the first ``num_tokens`` tokens; None when it is not known."""
        if self.place >= num_tokens:
            return None
        return LastPlace(self.place, min(self.num_seen, num_tokens))


class PromptTokenIds(list[int]):
    """The token ids of one prompt, and which earlier prompt they continue. vLLM sees a plain list.

    Made by ``render``. ``transport`` sends only the ids that the base lacks. The list must not be
    changed after it was made.

    Attributes:
        version: the number of this prompt in its API process; 0 when it is not remembered.
        parent: the version of the prompt that it continues; 0 for none.
        num_parent_tokens: the number of leading tokens that it shares with its parent.
        last_places: what ``last_place`` found, by token id. Shared with the memory of prompts.
        digests: the digests of its first chunks of ``DIGEST_TOKENS`` tokens, as far as
            ``digest_of`` computed them. Shared with the memory of prompts.
        is_spliced: whether it contains generated ids in place of those of text that was rendered
            anew. It then differs from what a tokenizer makes of the text.
        parent_ends: whether the parent has hardly any tokens behind the shared ones, so that nobody
            will continue the parent itself.
    """

    __slots__ = (
        "digests",
        "is_spliced",
        "last_places",
        "num_parent_tokens",
        "parent",
        "parent_ends",
        "version",
    )

    def __init__(
        self,
        token_ids: Iterable[int] = (),
        *,
        version: int = 0,
        parent: int = 0,
        num_parent_tokens: int = 0,
        parent_ends: bool = False,
        is_spliced: bool = False,
        last_places: dict[int, LastPlace] | None = None,
        digests: list[bytes] | None = None,
    ) -> None:
        super().__init__(token_ids)
        self.version = version
        self.parent = parent
        self.num_parent_tokens = num_parent_tokens
        self.parent_ends = parent_ends
        self.is_spliced = is_spliced
        self.last_places = {} if last_places is None else last_places
        self.digests = [] if digests is None else digests

    def __reduce__(self) -> tuple[type[list[int]], tuple[list[int]]]:
        """Pickle it as a plain list."""
        return list, ([*self],)

    def last_place(self, token_id: int) -> int:
        """The index of the last occurrence of a token; -1 when there is none.

        Looks only at tokens that were not searched in an earlier prompt.
        """
        place, num_seen = self.last_places.get(token_id, LastPlace(-1, 0))
        if num_seen < len(self):
            for index in range(len(self) - 1, num_seen - 1, -1):
                if self[index] == token_id:
                    place = index
                    break
            self.last_places[token_id] = LastPlace(place, len(self))
        return place


def digest_of(token_ids: list[int]) -> bytes:
    """A digest of 32 bytes that is the same for equal token ids and for no others.

    Of a ``PromptTokenIds``, only chunks are read whose digest is not known from an earlier prompt.
    Call it from one thread, the event loop.
    """
    known = token_ids.digests if isinstance(token_ids, PromptTokenIds) else []
    for start in range(len(known) * DIGEST_TOKENS, len(token_ids), DIGEST_TOKENS):
        if len(token_ids) - start >= DIGEST_TOKENS:
            known.append(_digest(token_ids[start : start + DIGEST_TOKENS]))
    tail = token_ids[len(known) * DIGEST_TOKENS :]
    whole = blake2b(len(token_ids).to_bytes(8, "little"), digest_size=32)
    whole.update(b"".join(known))
    whole.update(_digest(tail))
    return whole.digest()


def _digest(token_ids: list[int]) -> bytes:
    return blake2b(np.array(token_ids, np.int32).tobytes(), digest_size=32).digest()
