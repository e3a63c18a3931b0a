# SPDX-License-Identifier: Apache-2.0
"""Real agent conversations, turn by turn: tokenized in parts against tokenized whole.

Needs a folder of traces (``VLLM_STATEFUL_TRACES``, else ``../shared/traces``). By default every
turn is tokenized in parts, and of each conversation the last and a sample of the others are
compared; with ``VLLM_STATEFUL_ALL_TURNS=1`` all are (minutes).
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tokenizer_kinds import ROOT, SMOLLM2, Kind, kind

from vllm_stateful.render.incremental_tokenizer import MIN_BYTES, IncrementalTokenizer
from vllm_stateful.render.text_memory import TextMemory

TRACES = Path(os.environ.get("VLLM_STATEFUL_TRACES") or ROOT.parent / "shared/traces")
FILES = sorted(TRACES.glob("text_dev_*.jsonl")) if TRACES.is_dir() else []
ALL_TURNS = os.environ.get("VLLM_STATEFUL_ALL_TURNS") == "1"
SAMPLE_CHARS = 1_000_000
"""How much text of one file is compared beside the last turns, about."""


def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    """A prompt in ChatML: tools in the system message, tool calls as Hermes writes them."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        system += f"\n\n# Tools\n\n<tools>\n{listed}\n</tools>"
    parts = [f"<|im_start|>system\n{system}<|im_end|>\n"]
    for message in messages:
        if message["role"] != "system":
            parts.append(f"<|im_start|>{message['role']}\n{_body(message)}<|im_end|>\n")
    return "".join(parts) + "<|im_start|>assistant\n"


def _body(message: dict[str, Any]) -> str:
    body = message.get("content") or ""
    if message["role"] == "tool":
        return f"<tool_response>\n{body}\n</tool_response>"
    for call in message.get("tool_calls") or ():
        function = call["function"]
        name = json.dumps(function["name"])
        body += f'\n<tool_call>\n{{"name": {name}, "arguments": {function["arguments"]}}}'
        body += "\n</tool_call>"
    return str(body)


def turns(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Of each turn of each conversation: its tenant, its prompt, whether it is the last."""
    with path.open() as lines:
        for number, line in enumerate(lines):
            row = json.loads(line)
            messages = row["messages"]
            ends = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
            for end in ends:
                yield number % 2, render(messages[:end], row["tools"]), end == ends[-1]


def a_tokenizer() -> Kind:
    return kind("smollm2" if SMOLLM2.exists() else "qwen")


@pytest.mark.skipif(not FILES, reason=f"no traces in {TRACES}: set VLLM_STATEFUL_TRACES")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_turn_of_a_trace(path: Path) -> None:
    it = a_tokenizer()
    memory = TextMemory(64 << 20)
    tokenizer = IncrementalTokenizer(it.rules, it.num_leading, it.vocab_size, memory)
    share = SAMPLE_CHARS / sum(len(text) for _, text, _ in turns(path))
    random = Random(path.name)
    num_turns = num_compared = num_short = num_continued = 0
    wrong: list[str] = []
    seconds = {"parts": 0.0, "whole": 0.0}
    for tenant, text, is_last in turns(path):
        num_turns += 1
        started = time.perf_counter()
        ids = tokenizer.tokenize(text, it.encode, tenant=tenant, add_special_tokens=False)
        seconds["parts"] += time.perf_counter() - started
        if ids is None:
            assert len(text) < MIN_BYTES, text[:200]
            num_short += 1
            continue
        num_continued += ids.num_parent_tokens > 0
        if ALL_TURNS or is_last or random.random() < share:
            started = time.perf_counter()
            full = it.encode(text, False)
            seconds["whole"] += time.perf_counter() - started
            num_compared += 1
            if ids != full:
                wrong.append(text[-100:])
    print(
        f"\n{path.stem}: {num_turns} turns, {num_continued} continued, {num_short} short, "
        f"{num_compared} compared, {len(wrong)} mismatches; "
        f"{seconds['parts']:.1f} s in parts, {seconds['whole']:.1f} s whole (those compared)"
    )
    assert wrong == []
    assert num_compared or num_short == num_turns


def test_the_rendering() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    assert render(messages, [{"type": "function"}]) == (
        '<|im_start|>system\nBe brief.\n\n# Tools\n\n<tools>\n{"type": "function"}\n</tools>'
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        '<|im_start|>assistant\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n'
        "</tool_call><|im_end|>\n<|im_start|>tool\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
