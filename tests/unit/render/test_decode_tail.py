# SPDX-License-Identifier: Apache-2.0
"""A ``DecodeStream`` primed with the tail of a prompt against one primed with all of it.

One sort of prompt is left out: with special tokens skipped, the tail may begin inside a run of
byte tokens that is only a run because special tokens within it are skipped. The whole prompt then
ends in U+FFFD while its tail does not; the stock stream answers such a prompt by repeating all of
it with the first token. See ``test_a_run_of_byte_tokens_around_a_special_token``.
"""

from collections import Counter
from collections.abc import Sequence
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tokenizer_kinds import MIXED_TEXT, NAMES, Kind, kind
from tokenizers.decoders import DecodeStream

from vllm_stateful.render.decode_tail import (
    MIN_TAIL,
    REPLACEMENT,
    Stream,
    is_decodable_from_tail,
    tail_for_decoding,
)

EXAMPLES_PER_KIND = 100
NUM_FOLLOWING = 12

counts: Counter[str] = Counter()

TEXTS = (
    *MIXED_TEXT,
    "🙂🎉👩\u200d👩\u200d👧🇩🇪 ☃ ﷺ 𝔘𝔫𝔦 \u0000\u0007",
    "日本語のテキスト我们今天去北京한국어",
    "   \n\n \t  \r\n\u3000\u00a0",
    "a . b , c ! don't I 'm it 's do n't",
    "\ufffd x \ufffd\ufffd",
    " leading space, trailing space ",
)


def decode_as(it: Kind, skip_special_tokens: bool):  # type: ignore[no-untyped-def]
    def decode(token_ids: Sequence[int]) -> str:
        return str(it.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    return decode


def emitted(it: Kind, prompt: Sequence[int], following: list[int], skip: bool) -> list[str | None]:
    """What a stream says token by token; an error is its last word, as vLLM then begins anew."""
    stream = DecodeStream(ids=list(prompt), skip_special_tokens=skip)
    said: list[str | None] = []
    for token_id in following:
        try:
            said.append(stream.step(it.tokenizer, token_id))
        except Exception as error:
            return [*said, str(error).partition(".")[0]]
    return said


def tail_of(it: Kind, prompt: list[int], skip: bool) -> Sequence[int]:
    return tail_for_decoding(prompt, decode_as(it, skip), it.tokenizer.id_to_token)


def check(it: Kind, prompt: list[int], following: list[int], skip: bool) -> None:
    """One prompt: the same from the tail as from the whole."""
    tail = tail_of(it, prompt, skip)
    assert list(tail) == prompt[len(prompt) - len(tail) :]
    decode = decode_as(it, skip)
    whole_is_broken = decode(prompt).endswith(REPLACEMENT)
    if whole_is_broken and not decode(tail).endswith(REPLACEMENT):
        assert skip, "left out only where special tokens are skipped"
        counts["left out"] += 1
        return
    counts["whole" if len(tail) == len(prompt) else "tail"] += 1
    counts["ends in U+FFFD"] += whole_is_broken
    assert emitted(it, tail, following, skip) == emitted(it, prompt, following, skip)


class Ids:
    """Draws stretches of token ids of several sorts."""

    def __init__(self, it: Kind, seed: int) -> None:
        self.it = it
        self.random = Random(seed)
        byte_tokens = (it.tokenizer.token_to_id(f"<0x{n:02X}>") for n in range(256))
        self.bytes = [token_id for token_id in byte_tokens if token_id is not None]
        added = it.tokenizer.get_added_tokens_decoder()
        self.special = [token_id for token_id, token in added.items() if token.special]

    def draw(self, sort: str, length: int) -> list[int]:
        if sort == "text":
            return self.text(length)
        pool: Sequence[int] = range(self.it.vocab_size)
        if sort == "special":
            pool = self.special
        if sort == "bytes" and self.bytes:
            pool = self.bytes
        if sort == "letters" and self.bytes:
            pool = self.bytes[32:127] + self.special[:2]
        return [self.random.choice(pool) for _ in range(length)]

    def text(self, length: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < length:
            ids += self.it.encode(self.random.choice(TEXTS), False) or [0]
        start = self.random.randrange(len(ids) - length + 1)
        return ids[start : start + length]


SORTS = ("random", "text", "text", "special", "bytes", "letters")
STRETCHES = st.lists(
    st.tuples(st.sampled_from(SORTS), st.sampled_from([1, 2, 3, 5, 30, 63, 64, 65, 130, 300])),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("name", NAMES)
def test_any_prompt_primes_the_same_from_its_tail(name: str) -> None:
    it = kind(name)

    @settings(max_examples=EXAMPLES_PER_KIND, deadline=None)
    @given(stretches=STRETCHES, after=st.sampled_from(SORTS), seed=st.integers(0, 2**32))
    def prime(stretches: list[tuple[str, int]], after: str, seed: int) -> None:
        ids = Ids(it, seed)
        prompt = [token for sort, length in stretches for token in ids.draw(sort, length)]
        following = ids.draw(after, NUM_FOLLOWING)
        for skip in (True, False):
            check(it, prompt, following, skip)

    prime()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skip", [True, False])
def test_real_text_cut_at_every_token(name: str, skip: bool) -> None:
    """The prompt ends, and its tail begins, at every place: inside characters as well."""
    it = kind(name)
    text = "".join(TEXTS) + it.safe[0] + "user\n" + TEXTS[4] + it.safe[-1]
    ids = it.encode(text, False)
    for end in range(MIN_TAIL + 1, len(ids) - 8, 3):
        check(it, ids[:end], ids[end : end + 8], skip)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_special_tokens_only(name: str) -> None:
    it = kind(name)
    special = Ids(it, 0).draw("special", 500)
    following = it.encode("Hello, 日本!", False)
    if name not in ("t5", "bert"):  # whose unknown token is among them
        assert len(tail_of(it, special, True)) in (500, MIN_TAIL)
    for skip in (True, False):
        check(it, special, following, skip)


def test_an_ordinary_prompt_needs_only_its_tail() -> None:
    it = kind("llama2")
    prompt = it.encode("The quick brown fox. " * 200, True)
    assert len(tail_of(it, prompt, True)) == MIN_TAIL
    assert tail_of(it, prompt[:MIN_TAIL], True) == prompt[:MIN_TAIL]
    assert tail_of(it, [], True) == []


def test_white_space_and_runs_of_bytes_lengthen_the_tail() -> None:
    it = kind("llama2")
    blank = it.encode("fox\n", False)[-1:] * 100
    assert len(tail_of(it, it.encode("fox " * 99, False) + blank, True)) == 4 * MIN_TAIL
    emoji = it.encode("fox " + "🙂" * 30, False)
    prompt = it.encode("fox " * 99, False) + emoji
    tail = tail_of(it, prompt, True)
    assert MIN_TAIL < len(tail) < 2 * MIN_TAIL + 10
    assert it.tokenizer.decode(tail).endswith("🙂" * 30)


@pytest.mark.xfail(reason="the run is not followed across special tokens", strict=True)
def test_a_run_of_byte_tokens_around_a_special_token() -> None:
    """A lead byte, a special token that is skipped, then letters spelled in byte tokens."""
    it = kind("llama2")
    byte = it.tokenizer.token_to_id
    letters = [byte("<0x41>")] * (MIN_TAIL - 1)
    prompt = [*it.encode("fox " * 9, False), byte("<0xE6>"), byte("</s>"), *letters]
    tail = tail_of(it, prompt, True)
    following = it.encode("fox", False)
    assert emitted(it, tail, following, True) == emitted(it, prompt, following, True)


# ---- the trial at start-up ---------------------------------------------------------------


def stream_of(it: Kind, prompt: Sequence[int]) -> Stream:
    stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
    return lambda token_id: stream.step(it.tokenizer, token_id)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_the_trial_passes_each_kind(name: str, seed: int) -> None:
    it = kind(name)
    assert is_decodable_from_tail(
        lambda prompt: stream_of(it, prompt),
        it.tokenizer.decode,
        it.tokenizer.id_to_token,
        it.vocab_size,
        seed,
    )


def test_the_trial_refuses_a_decoder_that_counts() -> None:
    """One whose text depends on how many tokens stand before."""
    it = kind("qwen")

    def count(prompt: Sequence[int]) -> Stream:
        stream = stream_of(it, prompt)
        return lambda token_id: f"{len(prompt)}{stream(token_id)}"

    assert not is_decodable_from_tail(
        count, it.tokenizer.decode, it.tokenizer.id_to_token, it.vocab_size
    )


def test_what_was_looked_at() -> None:
    """Stands last (visible with ``-rP``)."""
    print(f"\nprompts: {dict(sorted(counts.items()))}")
    assert counts["left out"] <= sum(counts.values()) // 100
