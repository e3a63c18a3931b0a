# SPDX-License-Identifier: Apache-2.0
"""Which tokens probably come next, and how likely each is to be accepted.

A draft copies what followed at earlier places that end in the same tokens as the text. When these
places disagree, the majority decides, weighed by the length of each match; of equals the newest
wins. Each drafted token belongs to a class: by the length of its match (drafted tokens included),
by how many places agree on it, by their share of the weight, and by whether it was said in other
sessions, too. How often tokens of each class are accepted is learned (``Acceptance``). A draft ends
where the next token is not worth its cost.

Source: frequency among matches as in SuffixDecoding (arXiv:2411.04975). There the chances are
shares of occurrences; here they are learned.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_stateful.speculate.compiled import compiled
from vllm_stateful.speculate.lookup_index import Found, Ints
from vllm_stateful.types import TokenArray

MAX_DRAFT = 32
"""The most tokens in one draft."""

LENGTHS = (2, 3, 4, 6, 9, 16, 32)
"""Match lengths at which the next class of tokens begins."""

AGREEMENTS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 0.999)
"""Shares of the places' weight at which the next class of tokens begins."""

PLACES = (2, 4)
"""Numbers of agreeing places at which the next class of tokens begins."""

LENGTH_POWER = 5
"""The weight of a place is the length of its match to this power."""

PRIOR_WEIGHT = 10.0
"""The number of tokens that the prior of a class counts as."""

MOST_SEEN = 2000.0
"""The most tokens that a class counts. Older outcomes then count less."""

Floats = NDArray[np.float64]

_CHANCES = np.array([0.4, 0.57, 0.69, 0.75, 0.83, 0.9, 0.95, 0.97])
"""The chance of a token when a single place matches, by the class of the match length."""

_SHARES = np.array(
    [0.03, 0.07, 0.12, 0.17, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.93, 0.98, 1.0]
)
"""Factors of that chance, by the class of the agreeing share."""
_POWERS = np.array([[1.0, 0.7, 0.35], [1.6, 1.0, 0.25]])
"""Powers to which that chance is raised, by the class of the number of places. The first row is for
tokens found in the session only, the second for tokens found in other sessions, too."""

PRIORS: Floats = _CHANCES[:, None, None, None] ** _POWERS[None, None] * _SHARES[None, :, None, None]
"""The chance of each class before anything is learned, from recorded agents. Shape
``[len(LENGTHS) + 1, len(AGREEMENTS) + 1, 2, len(PLACES) + 1]``."""


class Draft(NamedTuple):
    """Tokens that may come next.

    Attributes:
        tokens: int32, shape ``[num_tokens]``.
        classes: int32, shape ``[num_tokens]``: the class of each token, for ``Acceptance``.
        expected: the number of tokens that are expected to be accepted.
    """

    tokens: TokenArray
    classes: Ints
    expected: float


NO_DRAFT = Draft(np.empty(0, np.int32), np.empty(0, np.int32), 0.0)


class Acceptance:
    """How often drafted tokens of each class were accepted. Not thread-safe."""

    def __init__(self) -> None:
        self._seen = np.full(PRIORS.size, PRIOR_WEIGHT)
        self._accepted = PRIORS.ravel() * PRIOR_WEIGHT
        self.rates: Floats = self._accepted / self._seen

    def saw(self, draft: Draft, came: TokenArray) -> int:
        """Learn from the outcome of a draft.

        Args:
            draft: the draft as it was made. Not all of it need have been verified.
            came: the tokens that the model generated instead, shape ``[num_tokens]``.

        Returns:
            The number of leading tokens of the draft that were right. Nothing is learned from
            tokens behind the first wrong one.
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
    """A text, and the places in it that end in the same tokens as the session.

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
    """Make the draft that follows from the places found.

    Args:
        own: the session's own text.
        acceptance: how often tokens of each class were accepted so far.
        least_chance: the least chance at which a token is worth its cost. A token is drafted if it
            and all tokens before it are accepted with at least this chance.
        others: what the same agent said in other sessions.
        max_tokens: the most tokens in the draft.
    """
    num = len(own.found.places) + len(others.found.places)
    if not num or max_tokens <= 0:
        return NO_DRAFT
    out = np.empty(max_tokens, np.int32)
    classes = np.empty(max_tokens, np.int32)
    num, expected = _follow(
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
    return Draft(out[:num], classes[:num], expected) if num else NO_DRAFT


_LENGTHS = np.array(LENGTHS, np.int64)
_AGREEMENTS = np.array(AGREEMENTS, np.float64)
_PLACES = np.array(PLACES, np.int64)


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
    """Fill ``out`` and ``classes``, and set the ``places`` that disagree to -1.

    Returns:
        The number of drafted tokens, and how many of them are expected to be accepted.
    """
    chance, expected = 1.0, 0.0
    nexts = np.empty(len(places), np.int32)
    for step in range(len(out)):
        _next_of(own, others, places, num_own, out, step, nexts)
        token, each = _choose(nexts, lengths, num_own, step)
        if token < 0 or chance * rates[each] < least_chance:
            return step, expected
        chance *= rates[each]
        expected += chance
        out[step] = token
        classes[step] = each
        for one in range(len(places)):
            if nexts[one] != token:
                places[one] = -1
    return len(out), expected


@compiled
def _next_of(
    own: Ints, others: Ints, places: Ints, num_own: int, out: Ints, step: int, nexts: Ints
) -> None:
    """Fill ``nexts`` with the token ``step`` behind each place; -1 where there is none."""
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
        else:  # the place has reached the end of the text, so the draft repeats itself
            nexts[one] = out[place - len(own)]


@compiled
def _choose(nexts: Ints, lengths: Ints, num_own: int, step: int) -> tuple[int, int]:
    """The token with the largest weight, and its class; -1 as the token when there is none."""
    best, best_weight, total = -1, 0.0, 0.0
    best_length, best_count, is_others = 0, 0, 0
    for one in range(len(nexts)):
        if nexts[one] < 0:
            continue
        weight, longest, count, has_others = 0.0, 0, 0, 0
        for other in range(len(nexts)):
            if nexts[other] == nexts[one]:
                if other < one:  # this token was weighed when `one` was `other`
                    break
                weight += float(lengths[other]) ** LENGTH_POWER
                longest = max(longest, lengths[other])
                count += 1
                has_others = max(has_others, 1 if other >= num_own else 0)
        total += weight
        if weight > best_weight:
            best, best_weight = nexts[one], weight
            best_length, best_count, is_others = longest, count, has_others
    if best < 0:
        return -1, 0
    each = np.searchsorted(_LENGTHS, best_length + step, side="right")
    each *= len(_AGREEMENTS) + 1
    each += np.searchsorted(_AGREEMENTS, best_weight / total, side="right")
    each = each * 2 + is_others
    each *= len(_PLACES) + 1
    return best, int(each + np.searchsorted(_PLACES, best_count, side="right"))
