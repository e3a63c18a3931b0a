# SPDX-License-Identifier: Apache-2.0
"""Recorded agent conversations as token ids, each prompt written anew by a chat template.

The answers are what a model of that template writes: reasoning, then text, then calls. The next
prompt has them as the template writes them, so a history comes back changed:

- ``qwen3-thinking``: the generation prompt opens reasoning; the next question drops it.
- ``qwen3-calls``: no reasoning; the model writes calls without spaces, the template with them.
- ``gpt-oss``: analysis is dropped by the next question; calls move into the header.

The recordings have no reasoning, but for one answer. It is made up: 150 to 400 tokens of words from
the same recordings, the same in every run.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from benchmarks.gpu.serving_text import rows
from benchmarks.models import ROOT

MODELS = ROOT / "benchmarks" / "models"
REASONING = (150, 400)
"""Tokens, the fewest and the most."""
MOST_TOKENS = 40_000
"""A conversation ends before a prompt that is longer."""
SOURCES: Mapping[str, tuple[int, int]] = {
    "taubench": (10, 40),
    "tau2": (4, 40),
    "lmcache-miniswe": (4, 20),
    "pi-mono": (1, 40),
}
"""Conversations of each file, and the most turns of one."""

Ids = NDArray[np.int32]


class Turn(NamedTuple):
    """Token ids."""

    prompt: Ids
    answer: Ids


@dataclass(frozen=True)
class Talk:
    """A conversation."""

    name: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Style:
    """How one family of models writes.

    Attributes:
        file: its chat template.
        markers: tokens of its own.
        has_reasoning: whether answers begin with it.
        write: an answer as the model writes it, behind the generation prompt.
        end: the token that ends answers; those with calls end with ``end_of_call``.
        one_call: only the first call of an answer is kept, and its result.
    """

    file: str
    markers: tuple[str, ...]
    has_reasoning: bool
    write: Callable[[Mapping[str, Any]], str]
    end: str
    end_of_call: str
    one_call: bool = False


def _qwen3(message: Mapping[str, Any], separators: tuple[str, str] = (", ", ": ")) -> str:
    text = f"{message['reasoning']}\n</think>\n\n" if message["reasoning"] else ""
    text += message["content"]
    for number, call in enumerate(message["calls"]):
        written = json.dumps(call, ensure_ascii=False, separators=separators)
        gap = "\n" if message["content"] or number else ""
        text += f"{gap}<tool_call>\n{written}\n</tool_call>"
    return text


def _compact(message: Mapping[str, Any]) -> str:
    return _qwen3(message, (",", ":"))


def _gpt_oss(message: Mapping[str, Any]) -> str:
    text = f"<|channel|>analysis<|message|>{message['reasoning']}<|end|><|start|>assistant"
    for call in message["calls"]:
        written = json.dumps(call["arguments"], ensure_ascii=False)
        text += f"<|channel|>commentary to=functions.{call['name']} "
        return text + f"<|constrain|>json<|message|>{written}"
    return text + f"<|channel|>final<|message|>{message['content']}"


_QWEN = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_QWEN += ("<tool_response>", "</tool_response>")
_HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>")
_HARMONY += ("<|call|>", "<|return|>")
_IM_END = "<|im_end|>"

STYLES: Mapping[str, Style] = {
    "qwen3-thinking": Style("qwen3.jinja", _QWEN, True, _qwen3, _IM_END, _IM_END),
    "qwen3-calls": Style("qwen3.jinja", _QWEN, False, _compact, _IM_END, _IM_END),
    "gpt-oss": Style("gpt_oss.jinja", _HARMONY, True, _gpt_oss, "<|return|>", "<|call|>", True),
}


class Text:
    """The tokenizer of a style: SmolLM2's with the style's markers."""

    def __init__(self, folder: Path, markers: Sequence[str], end: Sequence[str]) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        added = [AddedToken(text, normalized=False, special=False) for text in markers]
        self._tokenizer.add_tokens(added)
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        self._cut = re.compile("(" + "|".join(map(re.escape, sorted(known, key=len))) + ")")
        self._hidden = set() if "<|start|>" not in markers else {"<|im_start|>", "<|im_end|>"}
        self._piece = cache(self._encode)
        self.ends = [self._tokenizer.token_to_id(text) for text in dict.fromkeys(end)]

    def ids(self, text: str) -> Ids:
        """A marker parts what is before it from what is behind, so pieces are remembered."""
        pieces = [self._piece(piece) for piece in self._cut.split(text) if piece]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32)

    def _encode(self, text: str) -> Ids:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    # ---- what the engine core asks a tokenizer for ---------------------------------------

    def get_vocab(self) -> dict[str, int]:
        """Without the markers of the other style."""
        vocabulary = self._tokenizer.get_vocab()
        return {text: token for text, token in vocabulary.items() if text not in self._hidden}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


def text_of(style: Style, folder: Path) -> Text:
    return Text(folder, style.markers, (style.end, style.end_of_call))


def talks(
    name: str, traces: Path, text: Text, sources: Mapping[str, tuple[int, int]]
) -> list[Talk]:
    """The recorded conversations, as a style has them."""
    style = STYLES[name]
    found = []
    for source, (number, most_turns) in sources.items():
        chosen = _chosen(traces / f"text_dev_{source}.jsonl", number)
        for row in chosen:
            turns: list[Turn] = []
            for turn in _turns(style, row, text):
                if len(turns) == most_turns or len(turn.prompt) > MOST_TOKENS:
                    break
                turns.append(turn)
            found.append(Talk(row["id"], tuple(turns)))
    return found


def _chosen(path: Path, number: int) -> list[dict[str, Any]]:
    """The first trial of each task, where a file has several."""
    found = [row for row in rows(path) if re.search(r"-r[1-9]$", row["id"]) is None]
    return found[:number]


def _turns(style: Style, row: dict[str, Any], text: Text) -> Iterator[Turn]:
    template = _template(style.file)
    messages = list(_messages(style, row, text))
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or not any(m["role"] == "user" for m in messages[:place]):
            continue
        prompt = template.render(
            messages=messages[:place], tools=row["tools"], thinking=style.has_reasoning
        )
        end = style.end_of_call if message["calls"] else style.end
        yield Turn(text.ids(prompt), text.ids(style.write(message) + end))


def _messages(style: Style, row: dict[str, Any], text: Text) -> Iterator[dict[str, Any]]:
    words = " ".join(m["content"] or "" for m in row["messages"]).split()
    dropped: set[str] = set()
    for place, message in enumerate(row["messages"]):
        if message.get("tool_call_id") in dropped:
            continue
        made = {"role": message["role"], "content": (message["content"] or "").strip()}
        if message["role"] == "assistant":
            calls = message.get("tool_calls") or []
            if style.one_call:
                dropped |= {call["id"] for call in calls[1:]}
                calls = calls[:1]
            made["calls"] = [_call(call["function"]) for call in calls]
            seed = f"{row['id']} {place}"
            made["reasoning"] = _reasoning(words, seed, text) if style.has_reasoning else ""
        yield made


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": function["name"], "arguments": json.loads(function["arguments"])}


def _reasoning(words: Sequence[str], seed: str, text: Text) -> str:
    """Words of the recording in an order of their own, as many as make the wanted tokens."""
    random = Random(zlib.crc32(seed.encode()))
    wanted = random.randint(*REASONING)
    plain = [word for word in words if word.isalpha()] or ["so"]
    said = "Okay"
    while len(text.ids(said)) < wanted:
        said += " " + " ".join(random.choices(plain, k=20))
    return said


@cache
def _template(file: str) -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string((MODELS / file).read_text())
