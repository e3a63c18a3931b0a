# SPDX-License-Identifier: Apache-2.0
"""The trial at start-up: it passes what may be tokenized in parts, and nothing else."""

from collections.abc import Callable

import pytest
from tokenizer_kinds import NAMES, Kind, kind, kind_of, plain, qwen, special
from tokenizers import Tokenizer

from vllm_stateful.render.incremental_tokenizer import Encode
from vllm_stateful.render.probe import count_leading, unsafe_reason
from vllm_stateful.render.safe_cuts import CutRules

LEADING = {"qwen": 0, "gpt2_nasty": 0, "smollm2": 0, "t5": None, "bert": None}


def reason_of(it: Kind, encode: Encode | None = None, seed: int = 0) -> str | None:
    return unsafe_reason(encode or it.encode, it.rules, it.num_leading, it.vocab_size, seed)


@pytest.mark.parametrize("name", NAMES)
def test_each_kind_passes(name: str) -> None:
    it = kind(name)
    assert [reason_of(it, seed=seed) for seed in range(2)] == [None] * 2


@pytest.mark.parametrize("name", NAMES)
def test_leading_tokens_are_counted(name: str) -> None:
    assert kind(name).num_leading == LEADING.get(name, 1)


def test_leading_tokens_are_unknown_without_a_token_to_tell_them_by() -> None:
    it = kind("llama2")
    assert count_leading(it.encode, CutRules.of({})) is None
    only_the_leading_one = {1: it.tokenizer.get_added_tokens_decoder()[1]}
    assert count_leading(it.encode, CutRules.of(only_the_leading_one)) is None


# ---- what is refused ---------------------------------------------------------------------


def without_safe_tokens() -> Tokenizer:
    """Every special token strips white space or is wanted in normalized text."""
    made = Tokenizer(qwen().model)
    made.pre_tokenizer = qwen().pre_tokenizer
    made.add_special_tokens(special("<|user|>", "<|end|>", rstrip=True))
    made.add_tokens(plain("<think>"))
    return made


def test_a_tokenizer_without_safe_tokens_is_refused() -> None:
    reason = reason_of(kind_of("none", without_safe_tokens()))
    assert reason is not None
    assert "no added token" in reason


def counts_from_the_start(it: Kind) -> Encode:
    """Ids that depend on how far from the start they stand."""

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        ids = it.encode(text, add_special_tokens)
        return [
            token if token in it.rules.contents or place % 7 else 40
            for place, token in enumerate(ids)
        ]

    return encode


def looks_across_special_tokens(it: Kind) -> Encode:
    """What follows a special token depends on what stands before it."""

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        ids = it.encode(text, add_special_tokens)
        for place in range(1, len(ids) - 1):
            ordinary = not {ids[place - 1], ids[place + 1]} & it.rules.contents.keys()
            if ids[place] in it.rules.contents and ordinary and ids[place - 1] % 2:
                ids[place + 1] = 41
        return ids

    return encode


def merges_with_special_tokens(it: Kind) -> Encode:
    """A special token and the one behind it become one."""

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        ids = it.encode(text, add_special_tokens)
        merged: list[int] = []
        for token in ids:
            if merged and merged[-1] in it.rules.contents and token not in it.rules.contents:
                merged[-1] = 42
            else:
                merged.append(token)
        return merged

    return encode


def prepares_the_whole_text(it: Kind) -> Encode:
    """A special token that the text begins with is dropped, as one's own is put there."""

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        ids = it.encode(text, add_special_tokens)
        return ids[1:] if ids and ids[0] in it.rules.contents else ids

    return encode


def remembers(it: Kind) -> Encode:
    """Dropout: the same text gives other ids the next time."""
    calls = [0]

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        calls[0] += 1
        ids = it.encode(text, add_special_tokens)
        return [*ids[:-1], 43] if ids and calls[0] % 5 == 0 else ids

    return encode


def keeps_the_end(it: Kind) -> Encode:
    """Truncates on the left, as a tokenizer does that was told a maximal length."""
    return lambda text, special: it.encode(text, special)[-200:]


BROKEN: tuple[Callable[[Kind], Encode], ...] = (
    *(counts_from_the_start, looks_across_special_tokens, merges_with_special_tokens),
    *(prepares_the_whole_text, remembers, keeps_the_end),
)


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda made: made.__name__)
@pytest.mark.parametrize("name", ["qwen", "smollm2"])
def test_a_broken_tokenizer_is_refused(name: str, break_it: Callable[[Kind], Encode]) -> None:
    it = kind(name)
    for seed in range(2):
        assert reason_of(it, break_it(it), seed) is not None


def test_stripping_the_whole_text_is_no_reason() -> None:
    """The part that is tokenized begins with a special token: white space in front of the whole
    text is in the part that was tokenized before, stripped then as it would be now."""
    it = kind("qwen")
    assert reason_of(it, lambda text, special: it.encode(text.strip(), special)) is None


def test_splitting_special_tokens_is_no_reason_as_such_texts_are_never_cut() -> None:
    """``encode_special_tokens``: exact, of no use, and refused by the renderer beforehand."""
    it = kind("qwen")
    tokenizer = Tokenizer.from_str(it.tokenizer.to_str())
    tokenizer.encode_special_tokens = True

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    assert reason_of(it, encode) is None
    tokenizer_in_parts = it.incremental()
    for text in ("<|im_start|>a<|im_end|>" * 9, "<|im_start|>a<|im_end|>" * 10):
        ids = tokenizer_in_parts.tokenize(text, encode, tenant=0, add_special_tokens=False)
        assert ids == encode(text, False)
        assert ids.num_parent_tokens == 0
