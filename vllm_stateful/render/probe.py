# SPDX-License-Identifier: Apache-2.0
"""Try at start-up whether a tokenizer's texts may be tokenized in parts.

``safe_cuts`` says where a text may be cut and why. The probe checks this for the tokenizer at hand,
on texts made to break it. The texts of a tokenizer that fails are tokenized as in stock vLLM.
"""

from __future__ import annotations

from random import Random
from typing import Any

from vllm_stateful.render.incremental_tokenizer import Encode, IncrementalTokenizer
from vllm_stateful.render.safe_cuts import CutRules
from vllm_stateful.render.text_memory import TextMemory

NUM_TURNS = 240

_PIECES = (
    *("the", " quick", "brown ", "fox", "ﬁ", "naïve", "e\u0301", "Straße", "İ", "日本語", "한국어"),
    *("🙂", "👩\u200d👩\u200d👧", "\U0001f1e9\U0001f1ea", "שלום", "\u202e", "\u200b", "\ufeff"),
    *("\x00", "\x07", "\x1b[", " ", "  ", "\t", "\n", "\n\n", "\r\n"),
    *("\u00a0", "\u2003", "\u3000", "▁", "▁▁", "Ġ", "##", "##ing"),
    *("0", "123", "4567890", "3.14", "'s", "'LL", "don't", "!!!", "...", "—", "<0x0A>", "</w>"),
    *('{"name": "f", "arguments": {"a": [1, 2.5, null]}}', "```python\n", "def f(x):\n    pass"),
    *("<", "<|", "|>", "<|im", "[", "[INST", "</", "<s", "s>", "<|end", "<unk>", "<pad>", "[UNK]"),
)


def count_leading(encode: Encode, rules: CutRules) -> int | None:
    """Count the tokens that the tokenizer puts in front of a text when it adds special tokens.

    Returns:
        The number; None when it also adds tokens behind the text, or when it cannot be found out.
    """
    for token_id, content in rules.contents.items():
        ids = list(encode(content.decode(), True))
        if ids.count(token_id) == 1:
            return len(ids) - 1 if ids[-1] == token_id else None
    return None


def unsafe_reason(
    encode: Encode, rules: CutRules, num_leading: int | None, vocab_size: int, seed: int = 0
) -> str | None:
    """Why a tokenizer's texts must be tokenized whole; None when parts give the same ids.

    Args:
        encode: the tokenizer.
        rules: its safe tokens.
        num_leading: see ``count_leading``.
        vocab_size: one more than the largest valid token id.
        seed: the seed of the random texts.
    """
    if not rules.contents:
        return "no added token is special, not normalized and not stripping"
    tried = IncrementalTokenizer(rules, num_leading, vocab_size, TextMemory(1 << 24))
    tried.min_bytes = 0
    random = Random(seed)
    text, num_handled = "", 0
    for _ in range(NUM_TURNS):
        text = _next_text(random, text, [content.decode() for content in rules.contents.values()])
        special = num_leading is not None and random.random() < 0.3
        ids = tried.tokenize(text, encode, tenant=None, add_special_tokens=special)
        if ids is None:
            continue
        num_handled += 1
        if list(ids) != list(encode(text, special)):
            return f"tokenized in parts, {text[-80:]!r} gives other ids"
    if num_handled < NUM_TURNS // 2:
        return "its special tokens are not found where their text stands"
    return None


def _next_text(random: Random, text: str, safe: list[str]) -> str:
    """The text of the next turn: continued, edited somewhere, cut off, or begun anew."""
    turn = "".join(_message(random, safe) for _ in range(random.randint(1, 3)))
    choice: Any = random.random()
    if choice < 0.6 and len(text) < 4000:
        return text + turn
    if choice < 0.85 and text:
        place = random.randrange(len(text))
        return text[:place] + random.choice(_PIECES) + text[place + random.randint(0, 3) :]
    if choice < 0.95 and text:
        return text[: random.randrange(len(text))] + turn
    return turn


def _message(random: Random, safe: list[str]) -> str:
    words = (random.choice(_PIECES) for _ in range(random.randint(0, 40)))
    body = "".join(words)
    if random.random() < 0.3:  # user text that looks like a special token
        body += random.choice(safe)[: random.randint(1, 20)]
    return random.choice(safe) + body + random.choice(safe)
