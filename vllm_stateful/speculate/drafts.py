# SPDX-License-Identifier: Apache-2.0
"""What probably comes next, and how far to trust it.

The text follows the places that end as it does: where they disagree the majority, weighed by how
long each match is, and among equals the newest. Each drafted token comes with what is known of its
chance: by how many tokens its place agrees with the text (the drafted ones included), and by how
many of the places agree with each other. What such tokens were worth is learned from what the
model accepts (``Acceptance``), so a draft ends where its next token is not worth its cost.

Source: draft length by match length as in SuffixDecoding (arXiv:2411.04975), learned here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_stateful.speculate.compiled import compiled
from vllm_stateful.speculate.lookup_index import Found, Ints
from vllm_stateful.types import TokenArray

MAX_DRAFT = 32
"""Tokens that one draft has at most."""

LENGTHS = (4, 5, 6, 8, 10, 13, 17, 24, 32, 48)
"""Match lengths from which a token counts as of the next class."""

AGREEMENTS = (0.5, 0.75, 0.999)
"""Shares of the places from which a token counts as of the next class."""

PRIOR_WEIGHT = 10.0
"""Tokens that the prior counts as."""

MOST_SEEN = 2000.0
"""Older outcomes count less and less."""

Floats = NDArray[np.float64]

PRIORS: Floats = np.linspace(0.35, 0.97, len(LENGTHS) + 1)[:, None] * np.array(
    [[0.45, 0.65, 0.85, 1.0]]
)
"""Shape ``[len(LENGTHS) + 1, len(AGREEMENTS) + 1]``: chances before anything is learned."""


class Draft(NamedTuple):
    """Tokens that may come next.

    Attributes:
        tokens: int32, shape ``[num_tokens]``.
        classes: int32, shape ``[num_tokens]``: what ``Acceptance`` knows each by.
        chance: that all of them are accepted.
    """

    tokens: TokenArray
    classes: Ints
    chance: float


NO_DRAFT = Draft(np.empty(0, np.int32), np.empty(0, np.int32), 1.0)


class Acceptance:
    """How often drafted tokens of each class were accepted. Not thread-safe."""

    def __init__(self) -> None:
        self._seen = np.full(PRIORS.size, PRIOR_WEIGHT)
        self._accepted = PRIORS.ravel() * PRIOR_WEIGHT
        self.rates: Floats = self._accepted / self._seen

    def saw(self, draft: Draft, came: TokenArray) -> int:
        """A draft was verified.

        Args:
            draft: as it was made, though less of it may have been verified.
            came: the tokens that came in its place, shape ``[num_tokens]``.

        Returns:
            How many tokens of the draft came. Those behind the first that did not teach nothing.
        """
        num = min(len(draft.tokens), len(came))
        right = draft.tokens[:num] == came[:num]
        num_right = num if right.all() else int(right.argmin())
        for place, each in enumerate(draft.classes[: min(num_right + 1, num)].tolist()):
            self._seen[each] += 1
            self._accepted[each] += place < num_right
            if self._seen[each] > MOST_SEEN:
                self._accepted[each] *= MOST_SEEN / self._seen[each]
                self._seen[each] = MOST_SEEN
            self.rates[each] = self._accepted[each] / self._seen[each]
        return num_right


class Text(NamedTuple):
    """A text, and the places in it that end as the session does.

    Attributes:
        tokens: int32, shape ``[num_tokens]``.
        found: the places.
    """

    tokens: TokenArray
    found: Found


NOWHERE = Text(np.empty(0, np.int32), Found(np.empty(0, np.int32), np.empty(0, np.int32)))


def draft_of(
    own: Text,
    acceptance: Acceptance,
    least_chance: float,
    *,
    others: Text = NOWHERE,
    max_tokens: int = MAX_DRAFT,
) -> Draft:
    """The draft that follows from some places.

    Args:
        own: the session itself.
        acceptance: what such tokens were worth so far.
        least_chance: a token is drafted if the chance that it and all before it are accepted is
            at least this; what it must be for the token to be worth its cost.
        others: another text, what the same agent said in other sessions.
        max_tokens: of the draft.
    """
    num = len(own.found.places) + len(others.found.places)
    if not num or max_tokens <= 0:
        return NO_DRAFT
    out = np.empty(max_tokens, np.int32)
    classes = np.empty(max_tokens, np.int32)
    num, chance = _follow(
        own.tokens,
        others.tokens,
        np.concatenate([own.found.places, others.found.places]),
        np.concatenate([own.found.lengths, others.found.lengths]),
        len(own.found.places),
        acceptance.rates,
        least_chance,
        out,
        classes,
    )
    return Draft(out[:num], classes[:num], chance) if num else NO_DRAFT


_LENGTHS = np.array(LENGTHS, np.int64)
_AGREEMENTS = np.array(AGREEMENTS, np.float64)


@compiled
def _follow(
    own: Ints,
    others: Ints,
    places: Ints,
    lengths: Ints,
    num_own: int,
    rates: Floats,
    least_chance: float,
    out: Ints,
    classes: Ints,
) -> tuple[int, float]:
    """Fills ``out`` and ``classes``; ``places`` loses those that disagree (they become -1)."""
    chance = 1.0
    nexts = np.empty(len(places), np.int32)
    for step in range(len(out)):
        for one in range(len(places)):
            nexts[one] = -1
            if places[one] < 0:
                continue
            place = places[one] + step
            if one >= num_own:
                if place < len(others):
                    nexts[one] = others[place]
            elif place < len(own):
                nexts[one] = own[place]
            else:  # the text repeats itself
                nexts[one] = out[place - len(own)]
        best, best_weight, best_length, total = -1, 0.0, 0, 0.0
        for one in range(len(places)):
            if nexts[one] < 0:
                continue
            weight, longest, is_first = 0.0, 0, True
            for other in range(len(places)):
                if nexts[other] == nexts[one]:
                    is_first = is_first and other >= one
                    weight += float(lengths[other]) ** 2
                    longest = max(longest, lengths[other])
            if is_first:
                total += weight
                if weight > best_weight:
                    best, best_weight, best_length = nexts[one], weight, longest
        if best < 0:
            return step, chance
        length = np.searchsorted(_LENGTHS, best_length + step, side="right")
        agreement = np.searchsorted(_AGREEMENTS, best_weight / total, side="right")
        each = length * (len(_AGREEMENTS) + 1) + agreement
        if chance * rates[each] < least_chance:
            return step, chance
        chance *= rates[each]
        out[step] = best
        classes[step] = each
        for one in range(len(places)):
            if nexts[one] != best:
                places[one] = -1
    return len(out), chance
