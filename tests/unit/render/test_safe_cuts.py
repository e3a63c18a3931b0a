# SPDX-License-Identifier: Apache-2.0
"""Which added tokens a text may be cut before, by hand and against the real matching."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tokenizer_kinds import NAMES, kind
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vllm_stateful.render.safe_cuts import CutRules, Cuts

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def special(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, **{"special": True, "normalized": False, **flags})


def safe_of(*tokens: AddedToken | str, never: tuple[int | None, ...] = ()) -> set[str]:
    """The contents of the safe ones among some tokens with the ids 0, 1, ..."""
    added = [special(token) if isinstance(token, str) else token for token in tokens]
    rules = CutRules.of(dict(enumerate(added)), never)
    assert rules.ids.tolist() == sorted(rules.contents)
    assert rules.ids.dtype == np.int32
    return {content.decode() for content in rules.contents.values()}


def test_special_tokens_that_stand_alone_are_safe() -> None:
    assert safe_of("<|im_start|>", "<|im_end|>") == {"<|im_start|>", "<|im_end|>"}
    assert safe_of("[INST]", "[/INST]", "<s>", "</s>") == {"[INST]", "[/INST]", "<s>", "</s>"}
    assert safe_of("<extra_id_1>", "<extra_id_10>") == {"<extra_id_1>", "<extra_id_10>"}
    assert safe_of("日本", "🙂") == {"日本", "🙂"}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_token_that_minds_its_surroundings_is_not_safe(flag: str) -> None:
    assert safe_of(special("<a>", **{flag: True}), "<b>") == {"<b>"}


def test_a_token_that_is_not_special_is_not_safe() -> None:
    assert safe_of(AddedToken("<tool_call>", special=False, normalized=False), "<b>") == {"<b>"}


@pytest.mark.parametrize("content", ["\n", " <a>", "<a>\n", "\u3000<a>", "   ", "<a>\x85"])
def test_a_token_that_begins_or_ends_with_white_space_is_not_safe(content: str) -> None:
    assert safe_of(special(content)) == set()


@pytest.mark.parametrize(
    ("tokens", "safe"),
    [
        pytest.param(["<|a|>", "<|a|>b"], {"<|a|>b"}, id="begins as a longer one"),
        pytest.param(["<|a|>", "x<|a|>"], {"x<|a|>"}, id="ends a longer one"),
        pytest.param(["<|a|>", "x<|a|>y"], {"x<|a|>y"}, id="inside a longer one"),
        pytest.param(["ab", "bc"], set(), id="ends as another begins"),
        pytest.param(["<|im_end|>", "|>>"], set(), id="ends as another begins, two characters"),
        pytest.param(["xyx"], set(), id="ends as it begins itself"),
        pytest.param(["aa"], set(), id="a repeated character"),
        pytest.param(["a"], {"a"}, id="one character"),
        pytest.param(["ab", "cd", "bc"], set(), id="a bridge between two others"),
        pytest.param(["ab", "ab"], set(), id="two ids for one text"),
    ],
)
def test_tokens_that_may_share_characters(tokens: list[str], safe: set[str]) -> None:
    assert safe_of(*tokens) == safe


def test_tokens_of_any_sort_are_in_the_way() -> None:
    for flags in ({"special": False}, {"normalized": True}, {"single_word": True}):
        assert safe_of("<|im_end|>", special("|>\n", **flags)) == set()
        assert safe_of("<a>", special("<a>\n", **flags)) == set()


def test_the_unknown_token_and_other_excluded_ones_are_not_safe_but_still_in_the_way() -> None:
    assert safe_of("<unk>", "<a>", never=[0, None]) == {"<a>"}
    assert safe_of("<unk>", "k>y", never=[0]) == set()


def test_an_empty_token_is_ignored() -> None:
    assert safe_of("", "<a>") == {"<a>"}


def test_reach_is_the_longest_of_all_added_tokens_in_bytes() -> None:
    added = {0: special("<a>"), 1: AddedToken("日本語日本語", special=False)}
    assert CutRules.of(added).reach == 18
    assert CutRules.of({}).reach == 0


# ---- finding the cuts --------------------------------------------------------------------

RULES = CutRules.of({7: special("<a>"), 9: special("<b>"), 5: special("<unk>")}, never=[5])


def ids(*token_ids: int) -> Any:
    return np.array(token_ids, np.int32)


def test_each_safe_token_is_a_cut() -> None:
    cuts = RULES.find("<a>é<b><a>".encode(), ids(7, 1, 2, 9, 7))
    assert cuts is not None
    assert cuts.byte_positions.tolist() == [0, 5, 8]
    assert cuts.token_positions.tolist() == [0, 3, 4]
    assert len(cuts) == 3


@pytest.mark.parametrize(
    ("text", "token_ids"),
    [
        pytest.param(b"<a>x", ids(7, 1, 7), id="one token more than the text"),
        pytest.param(b"x<a>y<a>", ids(1, 7, 2), id="one token less"),
        pytest.param(b"<a><b>", ids(9, 7), id="another order"),
        pytest.param(b"x", ids(9), id="no text at all"),
    ],
)
def test_no_cuts_when_text_and_tokens_disagree(text: bytes, token_ids: Any) -> None:
    assert RULES.find(text, token_ids) is None


def test_a_text_without_safe_tokens_has_no_cuts() -> None:
    for found in (RULES.find(b"<unk>", ids(5)), RULES.find(b"", ids())):
        assert found is not None
        assert len(found) == 0


def test_a_safe_token_of_which_no_id_is_found_is_no_cut() -> None:
    found = RULES.find(b"<a>x<b>", ids(1, 2, 9))
    assert found is not None
    assert found.byte_positions.tolist() == [4]


def test_last_within_and_joined() -> None:
    cuts = Cuts(np.array([0, 5, 8]), np.array([1, 3, 4]))
    assert [cuts.last_within(n) for n in (-1, 0, 4, 5, 7, 8, 99)] == [0, 1, 1, 2, 2, 3, 3]
    both = cuts.joined(1, Cuts(np.array([0, 6]), np.array([0, 2])), 5, 3)
    assert both.byte_positions.tolist() == [0, 5, 11]
    assert both.token_positions.tolist() == [1, 3, 5]
    assert len(Cuts.none()) == 0


# ---- against the real matching -----------------------------------------------------------

CONTENTS = st.text("ab<> ", min_size=1, max_size=4)
ADDED = st.builds(
    lambda content, is_special, flags: AddedToken(
        content, special=is_special, **{"normalized": False, **flags}
    ),
    CONTENTS,
    st.sampled_from([True, True, False]),
    st.sampled_from([{}, {}, {}, {}, *({flag: True} for flag in FLAGS)]),
)
WITH_BYTES = models.BPE(
    {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
)


def encoded(tokenizer: Tokenizer, text: str) -> Any:
    """None where tokenizers itself panics ("AddedVocabulary bad split"), as it would in vLLM.

    It does for an added token that strips white space next to another one, with white space
    between them: the two matches overlap.
    """
    try:
        return tokenizer.encode(text)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return None


@settings(max_examples=600, deadline=None)
@given(
    added=st.lists(ADDED, min_size=1, max_size=6, unique_by=lambda token: token.content),
    texts=st.lists(st.text("ab<> é", max_size=24), min_size=4, max_size=8),
)
def test_any_added_tokens_any_text_cut_anywhere(added: list[AddedToken], texts: list[str]) -> None:
    """At each cut the ids of both sides are those of the whole, and the cut is where it says."""
    tokenizer = Tokenizer(WITH_BYTES)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    rules = CutRules.of(tokenizer.get_added_tokens_decoder())
    pieces = [content.decode() for content in rules.contents.values()]
    for number, text in enumerate(texts):
        if pieces:
            text = text[:5] + pieces[number % len(pieces)] + text[5:]
        whole = encoded(tokenizer, text)
        if whole is None:
            continue
        cuts = rules.find(text.encode(), np.array(whole.ids, np.int32))
        assert cuts is not None
        assert len(cuts) == sum(token_id in rules.contents for token_id in whole.ids)
        for byte, token in zip(cuts.byte_positions, cuts.token_positions, strict=True):
            head, tail = text.encode()[:byte].decode(), text.encode()[byte:].decode()
            assert whole.offsets[token][0] == len(head)
            assert encoded(tokenizer, tail).ids == whole.ids[token:]
            # The head is only known with the token behind it: white space before it may count.
            known = head + tail.encode()[: rules.reach].decode(errors="ignore")
            assert encoded(tokenizer, known).ids[:token] == whole.ids[:token]


@pytest.mark.parametrize("name", NAMES)
def test_the_kinds_have_the_safe_tokens_they_should(name: str) -> None:
    it = kind(name)
    expected = {
        "qwen": {"<|endoftext|>", "<|im_start|>", "<|im_end|>"},
        "gpt2_nasty": {"<|a|>b", "[turn]", "[over]"},
        "llama2": {"<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>"},
        "phi3": {"<s>", "<|endoftext|>"},
        "gemma": {"<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"},
        "bert": {"[PAD]", "[CLS]", "[SEP]", "[MASK]"},
    }
    if name in expected:
        assert set(it.safe) == expected[name]
    assert len(it.safe) >= 2
