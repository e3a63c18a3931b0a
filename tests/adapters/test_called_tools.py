# SPDX-License-Identifier: Apache-2.0
"""The tool that an answer calls, from its token ids."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_stateful.adapters.engine import called_tools
from vllm_stateful.adapters.engine.called_tools import NUM_TOKENS, CalledTools

MARKER, NAME = 1, 2


WORDS = {MARKER: "<tool_call>", NAME: '{"name": "grep", ', 3: "to=functions.grep"}


class Tokenizer:
    """One word per token id."""

    def __init__(self, *, has_marker: bool) -> None:
        self._has_marker = has_marker
        self.num_decoded = 0

    def get_vocab(self) -> dict[str, int]:
        return {"<tool_call>": MARKER} if self._has_marker else {}

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        self.num_decoded += len(token_ids)
        return "".join(WORDS.get(token, "word ") for token in token_ids)


def called(tokenizer: Any, *answer: int) -> str | None:
    request: Any = SimpleNamespace(output_token_ids=answer)
    return CalledTools(tokenizer)(request)


@pytest.mark.parametrize("has_marker", [True, False])
def test_a_call_behind_a_short_answer(has_marker: bool) -> None:
    tokenizer = Tokenizer(has_marker=has_marker)
    assert called(tokenizer, 9, 9, MARKER, NAME, 9) == "grep"
    assert called(tokenizer, 9, 9) is None
    assert called(tokenizer) is None


def test_of_a_long_answer_only_the_call_is_decoded() -> None:
    tokenizer = Tokenizer(has_marker=True)
    assert called(tokenizer, *[9] * 5000, MARKER, NAME, *[9] * 5000) == "grep"
    assert tokenizer.num_decoded <= NUM_TOKENS


def test_a_name_that_stands_before_its_marker() -> None:
    assert called(Tokenizer(has_marker=True), *[9] * 50, 3, MARKER, 9) == "grep"


@pytest.mark.parametrize("before", [0, 3000])
def test_without_a_marker_both_ends_are_decoded(before: int) -> None:
    tokenizer = Tokenizer(has_marker=False)
    answer = [*[9] * before, MARKER, NAME, *[9] * (3000 - before)]
    assert called(tokenizer, *answer) == "grep"
    assert tokenizer.num_decoded <= 2 * NUM_TOKENS


def test_without_a_tokenizer_every_wait_is_for_the_user() -> None:
    assert called(None, MARKER, NAME) is None


def test_one_answer_that_cannot_be_decoded_costs_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OverflowError("id 70000 is beyond the vocabulary")

    tokenizer = Tokenizer(has_marker=True)
    tools = CalledTools(tokenizer)
    request: Any = SimpleNamespace(output_token_ids=[MARKER, NAME])
    assert tools(request) == "grep"
    monkeypatch.setattr(tokenizer, "decode", fail)
    said: list[str] = []
    monkeypatch.setattr(called_tools.logger, "warning", lambda text, *_: said.append(text))
    assert [tools(request) for _ in range(5)] == [None] * 5
    assert tools.num_failed == 5
    assert len(said) == 1
    monkeypatch.undo()
    assert tools(request) == "grep"


def test_a_tokenizer_without_a_vocabulary_ends_nothing() -> None:
    assert called(SimpleNamespace(), MARKER, NAME) is None
