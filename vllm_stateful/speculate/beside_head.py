# SPDX-License-Identifier: Apache-2.0
"""Which draft is verified: that of the model's drafting head, or what the session repeats.

A step verifies one draft for each turn. What came then tells how many tokens of *both* were right:
the one that was not verified is compared with the tokens that came. So nothing has to be tried to
be learned. Drafts of a session are told apart by how many of their tokens are expected to be right,
and of each kind the sum of the differences decides. The verified draft counts in full; the other
one only as far as tokens came, so the sum errs towards what is verified now.
"""

from __future__ import annotations

import numpy as np

KINDS = 16
"""Kinds of drafts, by the share of their tokens that is expected to be right."""

HEAD_CHANCE = 0.75
"""What a token of a head is worth before anything was seen: the upper end of what is published."""

PRIOR_DRAFTS = 6.0
"""Drafts that this counts as."""

FORGET = 0.98
"""How much less each earlier draft of a kind counts than the one after it."""

REST_LOOKS = 16
"""So many steps pass without a look, while looks do not pay."""

GAIN_DECAY = 0.98
"""How much less each earlier look counts in what a look brings."""

PRIOR_GAIN = 0.2
"""Tokens that a look is expected to bring before anything was seen."""


class BesideHead:
    """What drafts from sessions are worth beside a head. Not thread-safe.

    Args:
        num_tokens: of a head's draft.
    """

    def __init__(self, num_tokens: int) -> None:
        head = float((HEAD_CHANCE ** np.arange(1, num_tokens + 1)).sum())
        session = (np.arange(KINDS) + 0.5) / KINDS * num_tokens
        self._num_tokens = num_tokens
        self._margins = (session - head) * PRIOR_DRAFTS
        self._gain = PRIOR_GAIN

    def is_better(self, expected: float) -> bool:
        """Whether a session's draft is to be verified in the place of the head's.

        Args:
            expected: how many of its tokens are expected to be right.
        """
        return bool(self._margins[self._kind(expected)] > 0.0)

    def saw(self, expected: float, num_session: int, num_head: int, *, is_session: bool) -> None:
        """A draft of each was compared with what came.

        Args:
            expected: as for ``is_better``.
            num_session: tokens of the session's that came.
            num_head: tokens of the head's that came.
            is_session: whether the session's was the one that was verified.
        """
        kind = self._kind(expected)
        self._margins[kind] = FORGET * self._margins[kind] + num_session - num_head
        self._gained(num_session - num_head if is_session else 0)

    def saw_nothing(self) -> None:
        """A look found no draft."""
        self._gained(0)

    def pays(self, look_seconds: float, token_seconds: float) -> bool:
        """Whether a look brings more time than it takes.

        Args:
            look_seconds: that a look takes.
            token_seconds: that a token of a turn takes.
        """
        return self._gain * token_seconds >= look_seconds

    def _gained(self, num_tokens: int) -> None:
        self._gain = GAIN_DECAY * self._gain + (1 - GAIN_DECAY) * num_tokens

    def _kind(self, expected: float) -> int:
        return min(KINDS - 1, max(0, int(expected / self._num_tokens * KINDS)))
