# SPDX-License-Identifier: Apache-2.0
"""Small real tokenizers of the kinds that language models use, trained here in a moment.

Their vocabularies are toys; their normalizers, pre-tokenizers, post-processors, decoders and
added tokens are those of the models that they are called after.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from vllm_stateful.render.incremental_tokenizer import IncrementalTokenizer
from vllm_stateful.render.probe import count_leading
from vllm_stateful.render.safe_cuts import CutRules
from vllm_stateful.render.text_memory import TextMemory

ROOT = Path(__file__).parents[3]
SMOLLM2 = ROOT / ".cache/models/smollm2-135m/tokenizer.json"
CONVERSATIONS = ROOT / "tests/data/conversations.jsonl"

MIXED_TEXT = (
    "The quick brown fox jumps over the lazy dog. It's 3.14, isn't it?  Don't; we'll see!\n",
    "def f(x: int) -> int:\n    return x + 1  # one more\n\n\nfor (i = 0; i < 10; i++) { a[i]; }\n",
    '{"name": "get_weather", "arguments": {"city": "Köln", "days": [1, 2, 3.5, null, true]}}\n',
    "Größe, naïve, façade, e\u0301te\u0301, Ünïcödé; Привет, мир! Как дела? Γειά σου Κόσμε.\n",
    "日本語のテキストです。東京は日本の首都。我们今天去北京。你好，世界！ 한국어 문장입니다.\n",
    "שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก 🙂🎉👩‍👩‍👧 ﬁ ½ Ⅷ ＜s＞ ①\n",
    "\tif x:\r\n\t\tpass\r\n\r\n| a | b |\n|---|---|\n```python\nprint('hello')\n```\n\n\n",
)

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def corpus() -> list[str]:
    """Lines of mixed text."""
    texts = list(MIXED_TEXT) * 4
    for line in CONVERSATIONS.read_text().splitlines():
        row = json.loads(line)
        texts.append(row["system"])
        texts += [message["content"] for turn in row["turns"] for message in turn]
    return texts


@dataclass(frozen=True, eq=False)
class Kind:
    """A tokenizer and what the code under test wants to know of it."""

    name: str
    tokenizer: Tokenizer
    rules: CutRules
    num_leading: int | None
    vocab_size: int

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Tokenize in full."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def incremental(self, max_bytes: int = 1 << 24) -> IncrementalTokenizer:
        """A new one, with a memory of its own, that handles short texts as well."""
        made = IncrementalTokenizer(
            self.rules, self.num_leading, self.vocab_size, TextMemory(max_bytes)
        )
        made.min_bytes = 0
        return made

    @property
    def safe(self) -> list[str]:
        """What its safe tokens look like."""
        return [content.decode() for content in self.rules.contents.values()]

    @property
    def added(self) -> list[str]:
        """What all its added tokens look like."""
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]


def special(*contents: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(c, special=True, normalized=False, **flags) for c in contents]


def plain(*contents: str, normalized: bool = False, **flags: bool) -> list[AddedToken]:
    return [AddedToken(c, special=False, normalized=normalized, **flags) for c in contents]


def around(tokenizer: Tokenizer, template: str, *tokens: str) -> Any:
    """A post-processor that puts tokens around the text."""
    ids = [(token, tokenizer.token_to_id(token)) for token in tokens]
    return processors.TemplateProcessing(single=template, special_tokens=ids)


# ---- byte-level BPE ----------------------------------------------------------------------


def _byte_level(pre_tokenizer: Any, *, size: int = 900) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    made.train_from_iterator(corpus(), trainer)
    return made


def _split_then_bytes() -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def llama3() -> Tokenizer:
    made = _byte_level(_split_then_bytes())
    made.add_special_tokens(
        special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>")
        + special("<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
        + special(*(f"<|reserved_special_token_{n}|>" for n in range(12)))
    )
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            around(made, "<|begin_of_text|> $A", "<|begin_of_text|>"),
        ]
    )
    return made


def qwen() -> Tokenizer:
    made = _byte_level(_split_then_bytes())
    made.normalizer = normalizers.NFC()
    made.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    made.add_tokens(plain("<tool_call>", "</tool_call>", "<think>", "</think>"))
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


def gpt2_nasty() -> Tokenizer:
    """GPT-2 with a leading space, and added tokens that get into each other's way."""
    made = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))
    made.add_special_tokens(
        special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|a|>", "<|a|>b")
        + special("|>>", "<|x", "xyx", "<|sep|>", "[turn]", "[over]")
        + special("<mask>", lstrip=True)
        + special("<|pad|>", rstrip=True)
        + special("<both>", lstrip=True, rstrip=True)
        + special("word", single_word=True)
        + [AddedToken("<|İN|>", special=True, normalized=True)]
    )
    made.add_tokens(plain("  ", "\n\n", "<|im", "end|>", " end", rstrip=False))
    made.add_tokens(plain("Strasse", "fox", normalized=True))
    made.add_tokens(plain("return", normalized=True, single_word=True, lstrip=True))
    made.add_tokens(plain("(x)", normalized=True, rstrip=True))
    return made


# ---- SentencePiece BPE -------------------------------------------------------------------


def _sentencepiece_bpe(*leading: str, size: int = 500) -> Tokenizer:
    """A BPE over whole texts with byte fallback; merges are learnt word by word."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=size, show_progress=False, limit_alphabet=90)
    )
    state = json.loads(learnt.to_str())["model"]
    words = sorted(state["vocab"], key=state["vocab"].__getitem__)
    names = [*leading, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {name: n for n, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(pair) for pair in state["merges"]]
    return Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )


def _sentencepiece_decoder(*last: Any) -> Any:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )


def llama2() -> Tokenizer:
    made = _sentencepiece_bpe("<unk>", "<s>", "</s>")
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = _sentencepiece_decoder(decoders.Strip(" ", 1, 0))
    made.add_special_tokens(special("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>"))
    made.post_processor = around(made, "<s> $A", "<s>")
    return made


def phi3() -> Tokenizer:
    """Llama-2 with special tokens that swallow the white space behind them."""
    made = _sentencepiece_bpe("<unk>", "<s>", "</s>")
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = _sentencepiece_decoder(decoders.Strip(" ", 1, 0))
    made.add_special_tokens(special("<unk>", "<s>", "<|endoftext|>"))
    made.add_tokens(plain("</s>", rstrip=True))
    rstrip = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|placeholder1|>")
    made.add_special_tokens(special(*rstrip, rstrip=True))
    made.post_processor = around(made, "<s> $A", "<s>")
    return made


def mistral() -> Tokenizer:
    """The newer form: no normalizer, white space marked by the pre-tokenizer."""
    made = _sentencepiece_bpe("<unk>", "<s>", "</s>")
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = _sentencepiece_decoder(decoders.Strip(" ", 1, 0))
    made.add_special_tokens(special("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"))
    made.post_processor = around(made, "<s> $A", "<s>")
    return made


def gemma() -> Tokenizer:
    """No space in front of the text, and added tokens for runs of newlines and spaces."""
    made = _sentencepiece_bpe("<pad>", "<eos>", "<bos>", "<unk>")
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = _sentencepiece_decoder()
    made.add_special_tokens(
        special("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    )
    made.add_tokens(plain(*("\n" * n for n in range(1, 8)), *("▁" * n for n in range(2, 8))))
    made.add_tokens(plain("<table>", "</table>", "[multimodal]"))
    made.post_processor = around(made, "<bos> $A", "<bos>")
    return made


# ---- Unigram and WordPiece ---------------------------------------------------------------


def _unigram(normalizer: Any, scheme: str, *leading: str) -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=500, show_progress=False, special_tokens=list(leading), unk_token="<unk>"
    )
    made.train_from_iterator(corpus(), trainer)
    made.add_special_tokens(special(*leading))
    return made


def t5() -> Tokenizer:
    """Puts a token behind the text."""
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" +"), " ")])
    made = _unigram(normalizer, "always", "<pad>", "</s>", "<unk>")
    made.add_special_tokens(special(*(f"<extra_id_{n}>" for n in range(12, -1, -1))))
    made.post_processor = around(made, "$A </s>", "</s>")
    return made


def xlnet() -> Tokenizer:
    """Strips the text's ends and lower-cases it."""
    normalizer = normalizers.Sequence(
        [
            *(normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()),
            *(normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")),
        ]
    )
    made = _unigram(normalizer, "first", "<unk>", "<s>", "</s>", "<cls>", "<sep>", "<eod>")
    made.add_special_tokens(special("<mask>", lstrip=True))
    made.post_processor = around(made, "<s> $A", "<s>")
    return made


def bert() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=700, show_progress=False, special_tokens=names)
    made.train_from_iterator(corpus(), trainer)
    made.add_special_tokens(special(*names))
    made.post_processor = around(made, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    return made


def smollm2() -> Tokenizer:
    if not SMOLLM2.exists():
        pytest.skip(f"{SMOLLM2} is absent: fetch the model to test its real tokenizer")
    return Tokenizer.from_file(str(SMOLLM2))


BUILDERS: tuple[Callable[[], Tokenizer], ...] = (
    *(llama3, qwen, gpt2_nasty, llama2, phi3, mistral, gemma, t5, xlnet, bert, smollm2),
)
NAMES: Sequence[str] = tuple(builder.__name__ for builder in BUILDERS)
_UNKNOWN = ("<unk>", "[UNK]")


@cache
def kind(name: str) -> Kind:
    """The tokenizer of that name; built once per session."""
    tokenizer = next(b for b in BUILDERS if b.__name__ == name)()
    return kind_of(name, tokenizer)


def kind_of(name: str, tokenizer: Tokenizer) -> Kind:
    """Look a tokenizer over as the renderer does."""
    never = [tokenizer.token_to_id(unknown) for unknown in _UNKNOWN]
    rules = CutRules.of(tokenizer.get_added_tokens_decoder(), never=never)

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    vocab_size = max(tokenizer.get_vocab().values()) + 1
    return Kind(name, tokenizer, rules, count_leading(encode, rules), vocab_size)
