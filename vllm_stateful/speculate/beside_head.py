# SPDX-License-Identifier: Apache-2.0
"""Which draft is verified: that of the model's drafting head, or that from the session's text.

A step verifies one draft for each turn. The tokens that then come show how many tokens of *both*
drafts were right: the draft that was not verified is compared with them, too. So nothing has to be
tried out just to learn from it. Drafts from sessions are divided into kinds by how many of their
tokens are expected to be right. For each kind, the sum of the differences between the two drafts
decides. The verified draft counts in full, but the other one only as far as tokens came, so the sum
is biased towards what is verified now.
"""

from __future__ import annotations

import numpy as np

KINDS = 16
"""Kinds of drafts, by the share of their tokens that is expected to be right."""

HEAD_CHANCE = 0.75
"""The assumed chance of a head's token before any draft was seen: the upper end of what is
published."""

PRIOR_DRAFTS = 6.0
"""The number of drafts that this assumption counts as."""

FORGET = 0.98
"""The weight of a draft of a kind, relative to the draft after it."""

REST_LOOKS = 16
"""Steps that pass without a look-up while look-ups do not pay."""

GAIN_DECAY = 0.98
"""The weight of a look-up in the mean gain, relative to the look-up after it."""

PRIOR_GAIN = 0.2
"""Tokens that a look-up is assumed to gain before any was seen."""


class BesideHead:
    """Compares drafts from sessions with those of a drafting head. Not thread-safe.

    Args:
        num_tokens: the number of tokens in a draft of the head.
    """

    def __init__(self, num_tokens: int) -> None:
        head = float((HEAD_CHANCE ** np.arange(1, num_tokens + 1)).sum())
        session = (np.arange(KINDS) + 0.5) / KINDS * num_tokens
        self._num_tokens = num_tokens
        self._margins = (session - head) * PRIOR_DRAFTS
        self._gain = PRIOR_GAIN

    def is_better(self, expected: float) -> bool:
        """Whether a session's draft should be verified instead of the head's.

        Args:
            expected: the number of its tokens that are expected to be right.
        """
        return bool(self._margins[self._kind(expected)] > 0.0)

    def saw(self, expected: float, num_session: int, num_head: int, *, is_session: bool) -> None:
        """Learn from a step for which both drafts were compared with the tokens that came.

        Args:
            expected: as for ``is_better``.
            num_session: tokens of the session's draft that were right.
            num_head: tokens of the head's draft that were right.
            is_session: whether the session's draft was the one that was verified.
        """
        kind = self._kind(expected)
        self._margins[kind] = FORGET * self._margins[kind] + num_session - num_head
        self._gained(num_session - num_head if is_session else 0)

    def saw_nothing(self) -> None:
        """Learn from a look-up that found no draft."""
        self._gained(0)

    def pays(self, look_seconds: float, token_seconds: float) -> bool:
        """Whether a look-up saves more time than it takes.

        Args:
            look_seconds: the seconds that a look-up takes.
            token_seconds: the seconds that a token of a turn takes.
        """
        return self._gain * token_seconds >= look_seconds

    def _gained(self, num_tokens: int) -> None:
        self._gain = GAIN_DECAY * self._gain + (1 - GAIN_DECAY) * num_tokens

    def _kind(self, expected: float) -> int:
        return min(KINDS - 1, max(0, int(expected / self._num_tokens * KINDS)))
