# SPDX-License-Identifier: Apache-2.0
"""A prompt's token ids that remember which earlier prompt they continue."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

DIGEST_TOKENS = 4096
"""A digest of a prompt is made of digests of so many tokens each, which later prompts share."""


class LastPlace(NamedTuple):
    """Where a token occurs last among the leading tokens that were looked at."""

    place: int
    num_seen: int

    def within(self, num_tokens: int) -> LastPlace | None:
        """The same of a shorter prompt; None when it is not known."""
        if self.place >= num_tokens:
            return None
        return LastPlace(self.place, min(self.num_seen, num_tokens))


class PromptTokenIds(list[int]):
    """Token ids of one prompt: a plain list for everybody who does not look closer.

    Made by ``render``; ``transport`` sends only what the base lacks. The list must not be
    changed after it was made.

    Attributes:
        version: number of this prompt in its API process; 0 when it is not remembered.
        parent: version of the prompt that it continues; 0 for none.
        num_parent_tokens: leading tokens that it shares with its parent.
        last_places: what ``last_place`` found, by token id; shared with the memory of prompts.
        digests: of its first chunks of ``DIGEST_TOKENS`` tokens, as far as ``digest_of`` was asked
            for; shared with the memory of prompts.
        is_spliced: whether generated ids stand in it for text that was rendered anew: then it
            is not what a tokenizer makes of the text.
        parent_ends: whether hardly anything of the parent lies behind the shared tokens, so
            that nobody will continue the parent itself.
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
        """Pickled as the plain list that it is to everybody else."""
        return list, ([*self],)

    def last_place(self, token_id: int) -> int:
        """Index of the last occurrence of a token, -1 when there is none.

        Looks only at what its parent had not been asked about.
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
    """32 bytes that only equal prompts share, whatever they were made of.

    Of a ``PromptTokenIds`` only the chunks are read that no prompt before it was asked for. To be
    called by one thread, the event loop.
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
