# SPDX-License-Identifier: Apache-2.0
"""The made-up conversations have the wanted size and are the same every time."""

from itertools import pairwise
from random import Random

import pytest

from benchmarks.serving import conversation
from benchmarks.serving.conversation import TEMPLATE_TOKENS


def count(text: str) -> int:
    """About as many as a tokenizer would find."""
    return len(text) // 4 + 1 if text else 0


@pytest.mark.parametrize(
    ("num_tokens", "num_messages"), [(300, 1), (5000, 1), (5000, 2), (6000, 400)]
)
def test_history_has_the_wanted_size(num_tokens: int, num_messages: int) -> None:
    messages = conversation.history(1, num_tokens, num_messages, count)
    total = sum(count(message["content"]) + TEMPLATE_TOKENS for message in messages)
    assert len(messages) == num_messages
    assert 0.95 * num_tokens <= total <= num_tokens
    assert all(message["content"] for message in messages)


def test_many_messages_alternate_and_end_with_the_user() -> None:
    even = [m["role"] for m in conversation.history(1, 1000, 4, count)]
    odd = [m["role"] for m in conversation.history(1, 1000, 3, count)]
    assert even == ["system", "user", "assistant", "user"]
    assert odd == ["user", "assistant", "user"]


def test_too_many_messages_for_the_tokens() -> None:
    assert not conversation.fits(1000, 400)
    with pytest.raises(ValueError, match="too few"):
        conversation.history(1, 1000, 400, count)


def test_each_turn_continues_the_one_before_it() -> None:
    first = conversation.history(7, 500, 1, count)
    turns = list(conversation.turns(7, first, 4, 170, count))
    assert turns[0] == first
    for earlier, later in pairwise(turns):
        assert later[: len(earlier)] == earlier
        assert [message["role"] for message in later[len(earlier) :]] == ["assistant", "user"]
        assert 150 <= count(later[-1]["content"]) <= 170


def test_same_numbers_same_text_other_numbers_other_text() -> None:
    assert conversation.history(1, 500, 1, count) == conversation.history(1, 500, 1, count)
    one, other = (conversation.history(seed, 500, 1, count)[0]["content"] for seed in (1, 2))
    assert one[:40] != other[:40]


def test_text_is_varied() -> None:
    words = conversation.text(Random(0), 5000, count).split()
    assert len(set(words)) > 500
