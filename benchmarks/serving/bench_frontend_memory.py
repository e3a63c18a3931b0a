# SPDX-License-Identifier: Apache-2.0
"""How much memory the API server takes for the prompts that it remembers.

    python -m benchmarks.serving.bench_frontend_memory [--sessions 1000] [--tokens 100000]

Fills the memory of the renderer with sessions that share nothing, without a bound and with the
default one, and prints what it accounts for beside what the process really grew by.
"""

import argparse
import gc
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from benchmarks.models import smollm2
from benchmarks.serving import conversation
from vllm_stateful.config import StatefulConfig
from vllm_stateful.render.incremental_tokenizer import IncrementalTokenizer
from vllm_stateful.render.safe_cuts import CutRules
from vllm_stateful.render.text_memory import TextMemory

MIB = 1 << 20


def resident_bytes() -> int:
    """Of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Sessions:
    """Long prompts that differ from their first word on, tokenized without waiting for it."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int) -> None:
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        long = conversation.text(Random(1), num_tokens, lambda text: len(self._encode(text)))
        self._body = f"<|im_start|>user\n{long}<|im_end|>\n"
        self._body_ids = self._encode(self._body)

    def text(self, index: int) -> str:
        return f"<|im_start|>system\nThis is session {index}.<|im_end|>\n" + self._body

    def encode(self, text: str, _: bool) -> list[int]:
        """Exact: the body begins with a special token."""
        head = text.removesuffix(self._body)
        return [*self._encode(head), *(int(str(i)) for i in self._body_ids)]


def fill(tokenizer: Tokenizer, sessions: Sessions, count: int, max_bytes: int) -> str:
    """Remember ``count`` sessions and say what that took."""
    rules = CutRules.of(tokenizer.get_added_tokens_decoder())
    gc.collect()
    before = resident_bytes()
    memory = TextMemory(max_bytes)
    incremental = IncrementalTokenizer(rules, 0, tokenizer.get_vocab_size(), memory)
    num_tokens = 0
    for index in range(count):
        ids = incremental.tokenize(
            sessions.text(index), sessions.encode, tenant=index % 10, add_special_tokens=False
        )
        assert ids is not None
        num_tokens = len(ids)
    del ids
    gc.collect()
    grown = resident_bytes() - before
    return (
        f"{count:>8} {num_tokens:>10} {max_bytes // MIB:>10} {len(memory):>6} "
        f"{memory.num_bytes / MIB:>14.0f} {grown / MIB:>12.0f} {grown / len(memory) / 1e6:>14.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=100_000)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(smollm2.ensure() / "tokenizer.json"))
    sessions = Sessions(tokenizer, args.tokens)
    print("sessions  tokens each  bound MiB   kept  accounted MiB  process MiB  MB per session")
    for max_bytes in (StatefulConfig.render_bytes, 1 << 40):
        print(fill(tokenizer, sessions, args.sessions, max_bytes), flush=True)


if __name__ == "__main__":
    main()
