# SPDX-License-Identifier: Apache-2.0
"""What the prefix tree costs with 10,000 sessions in it.

    python -m benchmarks.policy.bench_tree [--sessions 10000] [--tokens 100000]

The plugin's own ``ResidencyStore`` over blocks without content: sessions of one agent share a
system prompt, and one of them is long. Timed are a turn of the long session (its base known to the
transport, or compared token by token), what a turn's end adds, giving back under pressure, and what
the scheduler asks in every step.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median

import numpy as np

from vllm_stateful.prefix.boundaries import BoundaryRules
from vllm_stateful.prefix.groups import Table
from vllm_stateful.prefix.residency import FinishedTurn, PromptBase
from vllm_stateful.prefix.residency_store import ResidencyStore
from vllm_stateful.types import Demotion, Identity, SessionKey, TokenArray

BLOCK_SIZE = 16
VOCABULARY = {"<|im_start|>": 0, "<|im_end|>": 1, "user": 2, "assistant": 3, "tool": 4, "\n": 5}
FIRST_WORD = 10
MESSAGE, DELTA, SYSTEM, SHORT = 150, 700, 1000, 1500
"""Tokens of a message, of what a turn adds, of the system prompt, and of the other sessions."""


@dataclass(eq=False)
class Block:
    """One of nobody's blocks."""

    block_id: int


class Pool:
    """Block ids that are handed out anew when they are given back."""

    def __init__(self) -> None:
        self.num_made = 0
        self._free: list[Block] = []

    def take(self, count: int) -> list[Block]:
        """So many blocks."""
        while len(self._free) < count:
            self._free.append(Block(self.num_made))
            self.num_made += 1
        taken, self._free = self._free[-count:], self._free[:-count]
        return taken

    def release(self, blocks: Iterable[Block]) -> None:
        """Blocks come back."""
        self._free.extend(blocks)


class Sessions:
    """A store full of them."""

    def __init__(self, num_sessions: int, num_tokens: int) -> None:
        texts = {token: text for text, token in VOCABULARY.items()}
        rules = BoundaryRules.of(
            VOCABULARY, lambda ids: "".join(texts.get(token, " word") for token in ids)
        )
        self.chance, self.pool, self.now_s = Random(0), Pool(), 0.0
        num_blocks = 2 * (num_sessions * SHORT + 20 * num_tokens) // BLOCK_SIZE
        self.store = ResidencyStore(
            BLOCK_SIZE, num_blocks, num_blocks, self.pool.release, lambda: self.now_s, rules
        )
        self.system = list(self.messages(SYSTEM))
        for number in range(num_sessions):
            self.now_s += 0.05
            prompt = [*self.system, *self.messages(SHORT - SYSTEM)]
            self.end(self.key(number), np.array(prompt, np.int32), number)

    @staticmethod
    def key(number: int) -> SessionKey:
        """The name of a session."""
        return SessionKey(Identity("tenant"), f"session-{number}")

    def messages(self, num_tokens: int) -> Iterator[int]:
        """About so many tokens of messages."""
        for number in range(max(1, num_tokens // MESSAGE)):
            words = self.chance.choices(range(FIRST_WORD, 50_000), k=MESSAGE - 4)
            yield from (0, 2 + number % 3, 5, *words, 1)

    def end(self, session: SessionKey, prompt: TokenArray, version: object) -> None:
        """A turn of a session that was cold."""
        blocks = self.pool.take(-(-len(prompt) // BLOCK_SIZE))
        output = np.empty(0, np.int32)
        self.store.finish(
            FinishedTurn(session, prompt, output, len(prompt), (Table.of(blocks),), version=version)
        )


def measure(num_sessions: int, num_tokens: int, num_turns: int) -> dict[str, list[float]]:
    """Microseconds of each thing that is done, by name."""
    times_us: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., object], *arguments: object) -> None:
        start = time.perf_counter()
        function(*arguments)
        times_us.setdefault(name, []).append((time.perf_counter() - start) * 1e6)

    sessions = Sessions(num_sessions, num_tokens)
    store, long = sessions.store, SessionKey(Identity("tenant"), "session-long")
    prompt = np.array([*sessions.system, *sessions.messages(num_tokens - SYSTEM)], np.int32)
    sessions.end(long, prompt, "long-0")
    for number in range(num_turns):
        sessions.now_s += 5.0
        base = PromptBase(f"long-{number}", len(prompt))
        new = np.array(list(sessions.messages(DELTA)), np.int32)
        prompt = np.concatenate([prompt, new])
        limit = len(prompt) - 1
        match = store.match(long, prompt, limit, base)
        timed("match, base known", store.match, long, prompt, limit, base)
        timed("match, cold (all compared)", store.match, long, prompt, limit)
        found = match.residency
        assert found is not None
        (lent,) = store.borrow(found, "request")
        blocks = lent.blocks
        blocks.extend(sessions.pool.take(-(-len(prompt) // BLOCK_SIZE) - len(blocks)))
        output = np.empty(0, np.int32)
        table = Table.of(blocks, known=lent.ids)
        turn = FinishedTurn(long, prompt, output, len(prompt), (table,), borrowed=found, base=found)
        turn.num_base_tokens, turn.version = match.num_tokens, f"long-{number + 1}"
        timed("end of a turn", store.finish, turn)
        timed("what every step asks (expire)", store.expire, 1e6)
        timed("give back 16 blocks", store.demote_next, Demotion.PRESSURE, 16)
        if store.branches(long) == ():
            sessions.end(long, prompt, f"long-{number + 1}")
    return times_us


def main(arguments: Sequence[str]) -> int:
    """Print median, 99th percentile and largest of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", default="10,10000")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=200)
    args = parser.parse_args(arguments)
    print("sessions  what                             median us  99th  largest")
    for num_sessions in map(int, args.sessions.split(",")):
        for name, times_us in measure(num_sessions, args.tokens, args.turns).items():
            ordered = sorted(times_us)
            tail = ordered[int(0.99 * (len(ordered) - 1))]
            figures = f"{median(ordered):9.1f} {tail:5.0f} {ordered[-1]:8.0f}"
            print(f"{num_sessions:8d}  {name:32s} {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
