# SPDX-License-Identifier: Apache-2.0
"""Tokens of a text that was tokenized in parts against those of the text tokenized whole.

Hypothesis makes up conversations: turns, edits anywhere, truncations, regenerations and forks, of
several tenants in one memory, in which special tokens, and what looks like them, stand where they
should not. Every kind of tokenizer has its turn.
"""

import threading
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tokenizer_kinds import NAMES, Kind, kind

from vllm_stateful.render.incremental_tokenizer import MAX_RUNS, IncrementalTokenizer
from vllm_stateful.render.safe_cuts import CutRules
from vllm_stateful.render.text_memory import BYTES_PER_ENTRY, CONTINUED_TAIL_BYTES, TextMemory
from vllm_stateful.transport.prompt_ids import PromptTokenIds, digest_of

EXAMPLES_PER_KIND = 24
SEEDS_PER_KIND = 24
TURNS_PER_EXAMPLE = 30
MAX_CHARS = 900
WANTED_TURNS = 20_000

counts: Counter[str] = Counter()
"""Turns of this run: compared, continued (of those), none (and why)."""
tried: set[str] = set()
left_out: set[str] = set()

WORDS = (
    *(
        "the",
        " quick",
        "Brown ",
        "fox",
        "ing",
        "ﬁ",
        "naïve",
        "e",
        "\u0301",
        "\u0308",
        "Straße",
        "İ",
    ),
    *(
        "日本語",
        "ﷺ",
        "한국어",
        "ᄒ",
        "ᅡ",
        "ᆫ",
        "🙂",
        "👩\u200d👩\u200d👧",
        "\U0001f1e9",
        "\U0001f1ea",
    ),
    *("שלום", "नमस्ते", "\u202e", "\u200b", "\u200d", "\ufeff", "\ufffd", "\x00", "\x07", "\x1b["),
    *(
        " ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\n\n",
        "\n\n\n",
        "\r\n",
        "\r",
        "\x0b",
        "\x1c",
        "\x85",
        "\u00a0",
    ),
    *("\u2003", "\u3000", "\u2028", "▁", "▁▁", "Ġ", "Ċ", "##", "##ing", "<0x0A>", "<0xE6>", "</w>"),
    *(
        "0",
        "123",
        "4567890",
        "3.14",
        "'s",
        "'LL",
        "don't",
        "!!!",
        "...",
        "—",
        "½",
        "Ⅷ",
        "①",
        "＜s＞",
    ),
    *('{"name": "get_weather", "arguments": {"city": "Köln", "n": [1, 2.5, null]}}', "\\u0041"),
    *("```python\n", "def f(x):\n    return x\n", "\tif (x) {", "word", " end", "Strasse", "(x)  "),
    *("<", "<|", "|>", "<|im", "[", "[INST", "</", "<s", "s>", "<|end", "[CLS", "<extra_id_1", "b"),
    *("<|im_start|>assistant\n", "<|im_end|>\n", "<unk>", "[UNK]", "<pad>", "<s>", "</s>", "[SEP]"),
)


class Turn(NamedTuple):
    """What happens to which history, read from a few random bytes."""

    deed: str
    which: int
    place: float
    tenant: int
    add_special_tokens: bool
    words: bytes

    @classmethod
    def read(cls, made: bytes) -> "Turn":
        deed = DEEDS[made[0] % len(DEEDS)]
        place = int.from_bytes(made[2:4], "big") / 65536
        tenant = max(made[4] % 8 - 5, 0)
        return cls(deed, made[1], place, tenant, made[4] >= 176, made[5:])


DEEDS = (
    *("append", "append", "append", "append", "fresh", "again", "truncate", "fork", "fork"),
    *("insert", "insert", "delete", "replace", "replace"),
)


@dataclass
class Conversations:
    """Histories of some tenants, one incremental tokenizer, and what it said so far."""

    kind: Kind
    tokenizer: IncrementalTokenizer
    free_words: list[str] = field(default_factory=list)
    histories: list[str] = field(default_factory=lambda: [""])
    made: dict[int, tuple[Hashable, str, list[int]]] = field(default_factory=dict)

    def text_of(self, turn: Turn) -> str:
        """The next text."""
        recent = self.histories[-4:] if turn.which < 192 else self.histories
        old = recent[turn.which % len(recent)]
        place = int(turn.place * (len(old) + 1))
        message = self.message(turn.words)
        behind = place + 1 + turn.which % 3
        texts = {
            "append": old + message,
            "fresh": message,
            "again": old,
            "truncate": old[:place],
            "fork": old[:place] + message,
            "insert": old[:place] + self.word(turn.which) + old[place:],
            "delete": old[:place] + old[behind:],
            "replace": old[:place] + self.word(turn.which) + old[behind:],
        }
        text = texts[turn.deed]
        return text if len(text) <= MAX_CHARS else text[: int(turn.place * MAX_CHARS)]

    def message(self, words: bytes) -> str:
        """Chat-like, or only words."""
        text = "".join(map(self.word, words[2:]))
        safe = self.kind.safe
        if not words or words[0] % 4 == 0:
            return text
        return f"{safe[words[0] % len(safe)]}user\n{text}{safe[words[1] % len(safe)]}\n"

    def word(self, number: int) -> str:
        if number >= 224 and self.free_words:
            return self.free_words[number % len(self.free_words)]
        if number >= 160:
            return self.kind.added[number % len(self.kind.added)]
        return WORDS[number % len(WORDS)]

    def check(self, turn: Turn) -> None:
        """One turn: the text in parts against the text whole."""
        text = self.text_of(turn)
        self.histories.append(text)
        full = None if is_broken(text) else self.kind.encode(text, turn.add_special_tokens)
        scope = (turn.tenant, turn.add_special_tokens)
        ids = self.tokenizer.tokenize(
            text,
            self.kind.encode,
            tenant=turn.tenant,
            add_special_tokens=turn.add_special_tokens,
        )
        memory = self.tokenizer.memory
        assert memory.num_bytes <= memory.max_bytes
        if ids is None:
            counts[why_none(self.kind, text, turn.add_special_tokens, full)] += 1
            return
        counts["compared"] += 1
        counts["continued"] += ids.num_parent_tokens > 0
        assert ids == full
        self.check_parent(scope, text, ids)
        if ids and turn.place < 0.5:  # only some are asked, as in life
            for token_id in (min(self.kind.rules.contents), ids[len(ids) // 2]):
                assert ids.last_place(token_id) == last_place(ids, token_id)

    def check_parent(self, scope: Hashable, text: str, ids: PromptTokenIds) -> None:
        """What the ids say of the text that they continue."""
        assert ids.version > 0
        assert ids.version not in self.made
        self.made[ids.version] = (scope, text, list(ids))
        if not ids.parent:
            assert ids.num_parent_tokens == 0
            assert not ids.parent_ends
            return
        parent_scope, parent_text, parent_ids = self.made[ids.parent]
        assert parent_scope == scope
        shared = ids.num_parent_tokens
        assert shared <= len(parent_ids)
        assert ids[:shared] == parent_ids[:shared]
        num_behind = len(parent_text.encode()) - num_common(text.encode(), parent_text.encode())
        assert ids.parent_ends == (num_behind <= CONTINUED_TAIL_BYTES)


def num_common(left: bytes, right: bytes) -> int:
    pairs = zip(left, right, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def last_place(ids: list[int], token_id: int) -> int:
    return max((n for n, other in enumerate(ids) if other == token_id), default=-1)


def is_broken(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def why_none(kind: Kind, text: str, add_special_tokens: bool, full: list[int] | None) -> str:
    """The documented reason for an answer of None; fails when there is none."""
    if full is None:
        return "none: a lone surrogate"
    if add_special_tokens and kind.num_leading is None:
        return "none: special tokens behind the text"
    inner = full[kind.num_leading :] if add_special_tokens else full
    data = text.encode()
    made_up = [
        content
        for token_id, content in kind.rules.contents.items()
        if inner.count(token_id) != data.count(content)
    ]
    assert made_up, f"no reason for None: {text!r}"
    return "none: the model makes a special token of other text"


MEMORY_BYTES = (1 << 22, 1 << 22, 40_000, 12_000, 6_000, BYTES_PER_ENTRY + 900, 0)


def converse(it: Kind, max_bytes: int, free_words: list[str], turns: list[bytes]) -> None:
    """One tokenizer through some turns, from a history that has seen a few."""
    tokenizer = it.incremental(max_bytes)
    conversations = Conversations(it, tokenizer, free_words)
    opened, closed = it.safe[0], it.safe[-1]
    conversations.histories = [f"{opened}user\nHello{closed}\n{opened}bot\n Hi!{closed}\n" * 2]
    for made in turns:
        conversations.check(Turn.read(made))
    held = tokenizer.memory._entries.values()
    assert tokenizer.memory.num_bytes == sum(entry.cost for entry in held)


@pytest.mark.parametrize("name", NAMES)
def test_any_conversations_give_the_ids_of_the_whole_text(name: str) -> None:
    """Hypothesis looks for small and odd ones."""
    left_out.add(name)
    it = kind(name)
    left_out.discard(name)

    @settings(max_examples=EXAMPLES_PER_KIND, deadline=None)
    @given(
        max_bytes=st.sampled_from(MEMORY_BYTES),
        free_words=st.lists(st.text(min_size=1, max_size=4), max_size=4),
        turns=st.lists(
            st.binary(min_size=8, max_size=16),
            min_size=TURNS_PER_EXAMPLE,
            max_size=TURNS_PER_EXAMPLE,
        ),
    )
    def any_conversations(max_bytes: int, free_words: list[str], turns: list[bytes]) -> None:
        converse(it, max_bytes, free_words, turns)

    any_conversations()
    tried.add(name)


@pytest.mark.parametrize("name", NAMES)
def test_random_conversations_give_the_ids_of_the_whole_text(name: str) -> None:
    """Evenly random ones are larger, and continue each other more often."""
    it = kind(name)
    for seed in range(SEEDS_PER_KIND):
        random = Random(f"{name} {seed}")
        free_words = ["".join(chr(random.randrange(0xD800)) for _ in range(3)), "\ud83d"]
        turns = [random.randbytes(random.randint(8, 20)) for _ in range(TURNS_PER_EXAMPLE)]
        free_words = free_words[: 1 + (seed % 8 == 0)]
        converse(it, random.choice(MEMORY_BYTES), free_words, turns)


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_at_every_position(name: str) -> None:
    """Each character of a history replaced, deleted, and something put before it."""
    it = kind(name)
    first, last = it.safe[0], it.safe[-1]
    text = (
        f"{first}user\nWhat's 12+3? {last}\n{first}tool\n{{'a': \"日本 é\"}}{last} ok{first}bot\n"
    )
    for add_special_tokens in (False, True):
        conversations = Conversations(it, it.incremental())
        for place in range(len(text) + 1):
            for put, gone in (("x", 1), ("", 1), (last[:3], 0), (first, 0), (" ", 1)):
                edited = text[:place] + put + text[place + gone :]
                for now in (text, edited):
                    conversations.histories = [now]
                    conversations.check(Turn("again", 0, 0.0, 0, add_special_tokens, b""))


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_conversations_are_continued_and_never_refused(name: str) -> None:
    it = kind(name)
    tokenizer = it.incremental()
    opened, closed = it.safe[0], it.safe[-1]
    random = Random(0)
    add_special_tokens = it.num_leading is not None
    text, previous = "", 0
    for turn in range(40):
        words = " ".join(random.choice(["fox", "12", "dog.", "日本", "{x: 1}"]) for _ in range(30))
        text += f"{opened}user {words}{closed}\n{opened}assistant\n"
        ids = tokenizer.tokenize(text, it.encode, tenant="a", add_special_tokens=add_special_tokens)
        assert ids is not None
        assert ids == it.encode(text, add_special_tokens)
        if turn:
            # All but the generation prompt, whose token lies within reach of the end.
            reach = len(it.encode(f"{closed}\n{opened}assistant\n", False)) + it.rules.reach
            assert previous - reach <= ids.num_parent_tokens <= previous
            assert ids.parent_ends
        previous = len(ids)
        text += f"answer {turn}{closed}\n"
        counts["compared"] += 1
    assert len(tokenizer.memory) == 1


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("t5", "bert")])
def test_two_texts_that_share_only_their_first_token_both_get_the_leading_tokens_once(
    name: str,
) -> None:
    it = kind(name)
    tokenizer = it.incremental()
    for rest in ("one", "two"):
        text = it.safe[0] + "a common beginning of some length " * 3 + rest
        ids = tokenizer.tokenize(text, it.encode, tenant="a", add_special_tokens=True)
        assert ids == it.encode(text, True)


def test_tenants_never_share() -> None:
    it = kind("qwen")
    tokenizer = it.incremental()
    text = "<|im_start|>user\nfox<|im_end|>\n" * 20
    for tenant in ("a", "b", None, ("a", "salt")):
        for add_special_tokens in (False, True):
            for attempt in range(2):
                ids = tokenizer.tokenize(
                    text, it.encode, tenant=tenant, add_special_tokens=add_special_tokens
                )
                assert ids is not None
                assert bool(ids.num_parent_tokens) == bool(attempt)
                assert bool(ids.parent) == bool(attempt)


def test_only_what_is_new_is_tokenized() -> None:
    it = kind("qwen")
    tokenizer = it.incremental()
    seen: list[str] = []

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        seen.append(text)
        return it.encode(text, add_special_tokens)

    text = "<|im_start|>user\nfox<|im_end|>\n" * 50
    for new in ("", "<|im_start|>a<|im_end|>", "<|im_start|>b<|im_end|>"):
        text += new
        tokenizer.tokenize(text, encode, tenant=0, add_special_tokens=False)
    assert len(seen[0]) > 1000
    assert all(len(part) < 100 for part in seen[1:])


def test_a_remembered_text_shares_the_ids_of_the_one_that_it_continues() -> None:
    """Through more turns than it may have runs, and edits that cut into runs; digests as well."""
    it = kind("qwen")
    tokenizer = it.incremental()
    text, random, first = "", Random(3), ()
    for turn in range(3 * MAX_RUNS):
        if turn % 7 == 6:
            text = text[: random.randrange(len(text))]
        text += f"<|im_start|>user\nfox {turn}<|im_end|>\n" * 400 ** (turn == 0)
        ids = tokenizer.tokenize(text, it.encode, tenant=0, add_special_tokens=False)
        assert ids == it.encode(text, False)
        assert ids is not None
        assert digest_of(ids) == digest_of([*ids])
        entry = next(reversed(tokenizer.memory._entries.values()))
        assert [each for run in entry.token_runs for each in run] == ids
        assert entry.num_tokens == len(ids)
        assert 1 <= len(entry.token_runs) <= MAX_RUNS + 1
        if 1 < turn < 6:  # the first one is cut once
            assert entry.token_runs[0] is first
        first = entry.token_runs[0]


def test_a_memory_too_small_for_any_text_still_gives_the_right_ids() -> None:
    it = kind("llama3")
    tokenizer = it.incremental(max_bytes=10)
    text = "<|start_header_id|>user<|end_header_id|>hello" * 3
    for _ in range(3):
        ids = tokenizer.tokenize(text, it.encode, tenant=0, add_special_tokens=False)
        assert ids == it.encode(text, False)
        assert ids is not None
        assert ids.parent == 0
    assert len(tokenizer.memory) == 0


@pytest.mark.parametrize(
    ("text", "name", "add_special_tokens"),
    [
        pytest.param("<|im_start|> \ud83d x", "qwen", False, id="a lone surrogate"),
        pytest.param("<extra_id_0> x", "t5", True, id="special tokens behind the text"),
        pytest.param("<cls> ＜ｓ＞ x", "xlnet", False, id="the model makes a special token"),
    ],
)
def test_what_is_left_to_the_stock_path(text: str, name: str, add_special_tokens: bool) -> None:
    it = kind(name)
    for _ in range(2):
        ids = it.incremental().tokenize(
            text, it.encode, tenant=0, add_special_tokens=add_special_tokens
        )
        assert ids is None


def test_a_short_text_and_an_id_out_of_range_are_left_to_the_stock_path() -> None:
    it = kind("qwen")
    tokenizer = it.incremental()
    tokenizer.min_bytes = 100
    text = "<|im_start|>" + "x" * 87
    assert tokenizer.tokenize(text, it.encode, tenant=0, add_special_tokens=False) is None
    text += "x"
    assert tokenizer.tokenize(text, it.encode, tenant=0, add_special_tokens=False) is not None
    for wrong in (-1, it.vocab_size):
        ids = tokenizer.tokenize(
            "<|eot|>" * 20, lambda *_, w=wrong: [w], tenant=0, add_special_tokens=False
        )
        assert ids is None


def test_without_any_safe_token_every_text_is_tokenized_whole() -> None:
    it = kind("qwen")
    tokenizer = IncrementalTokenizer(CutRules.of({}), 0, it.vocab_size, TextMemory(1 << 20))
    tokenizer.min_bytes = 0
    text = ""
    for _ in range(5):
        text += "<|im_start|>user\nfox<|im_end|>\n"
        ids = tokenizer.tokenize(text, it.encode, tenant=0, add_special_tokens=False)
        assert ids == it.encode(text, False)
        assert ids is not None
        assert ids.num_parent_tokens == 0


def test_four_threads_on_one_memory() -> None:
    it = kind("llama3")
    tokenizer = it.incremental(max_bytes=12_000)
    wrong: list[str] = []

    def converse(seed: int) -> None:
        random = Random(seed)
        conversations = Conversations(it, tokenizer)
        for _ in range(150):
            text = conversations.text_of(Turn.read(random.randbytes(12)))
            conversations.histories.append(text)
            ids = tokenizer.tokenize(text, it.encode, tenant=0, add_special_tokens=False)
            if ids is None or ids != it.encode(text, False):
                wrong.append(text)

    threads = [threading.Thread(target=converse, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    counts["compared"] += 600
    held = tokenizer.memory._entries.values()
    assert tokenizer.memory.num_bytes == sum(entry.cost for entry in held) <= 12_000


def test_enough_turns_were_compared() -> None:
    """Stands last: how much the tests above looked at (visible with ``-rP``)."""
    print(f"\n{len(tried)} kinds of tokenizer, absent: {sorted(left_out) or 'none'}")
    for what, count in sorted(counts.items()):
        print(f"{count:7d} turns {what}")
    if tried | left_out != set(NAMES):
        pytest.skip("not all kinds were tried in this run")
    assert counts["compared"] >= WANTED_TURNS
    assert counts["continued"] >= WANTED_TURNS // 3
