# SPDX-License-Identifier: Apache-2.0
"""Accepted drafts of recorded answers: a drafting head alone, and with the session beside it.

    python -m benchmarks.speculate.beside_head [--traces FOLDER] [--sources SOURCE ...]

Every answer is replayed: a draft is accepted as far as it equals what was recorded. No model runs.
The head is made up: each token of its drafts is right with a chance, independently (``0.6`` to
``0.9``; what is published for EAGLE and MTP heads lies between). ``0.6/0.95`` is a head that is
right in 95% of the tokens that the session's draft has right too, and in 60% of the others: a head
that copies well, the worst case for a session. Both methods see the same head.

``engine`` is the choice in the engine core (model runner V1), ``device`` that of the kernels (V2).
Printed are accepted tokens a step, and the times that this is of the head alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.models import ROOT
from benchmarks.serving.recorded import _rows
from benchmarks.speculate.__main__ import SOURCES, _longest, tokenizers, turns
from vllm_stateful.adapters.worker.lookup_beside import prior_margins
from vllm_stateful.speculate.answer_buffer import END, MAX_MATCH, REGION_TOKENS, AnswerBuffer
from vllm_stateful.speculate.session_drafts import SessionDrafts
from vllm_stateful.types import TokenArray

HEADS = {"0.6": (0.6, 0.6), "0.7": (0.7, 0.7), "0.8": (0.8, 0.8), "0.9": (0.9, 0.9)}
HEADS["0.6/0.95"] = (0.6, 0.95)
"""Chance of a token where the session's draft is wrong, or there is none; and where it is right."""

WRONG = 1 << 30
Said = list[tuple[TokenArray, TokenArray]]


class Head:
    """A made-up head: what it proposes depends on the place in the text alone."""

    def __init__(self, chances: tuple[float, float], num_drafts: int) -> None:
        self._chances, self._num = chances, num_drafts
        self._random = np.random.default_rng(0)
        self._luck = np.empty(0)

    def begin(self, num_tokens: int) -> None:
        """An answer begins."""
        self._luck = self._random.random((num_tokens, self._num))

    def draft(self, answer: TokenArray, done: int, session: TokenArray) -> TokenArray:
        """What it proposes behind ``done`` tokens, where the session proposes something too."""
        rest = answer[done : done + self._num]
        told = np.full(self._num, WRONG, np.int32)
        told[: len(session)] = session[: self._num]
        is_told = (told[: len(rest)] == rest).cumprod().astype(bool)
        chances = np.where(is_told, self._chances[1], self._chances[0])
        draft = np.full(self._num, WRONG, np.int32)
        draft[: len(rest)] = np.where(self._luck[done, : len(rest)] < chances, rest, WRONG)
        return draft


class Engine:
    """`SessionDrafts` as the engine core has them."""

    def __init__(self, num_drafts: int) -> None:
        self._drafts = SessionDrafts(1 << 30, num_drafts)
        self._name = self._session = 0

    def conversation(self) -> None:
        self._session += 1

    def begin(self, text: TokenArray) -> None:
        self._drafts.begins(self._name, self._session, "agent", text)

    def found(self, most: int) -> TokenArray:
        return self._drafts.draft(self._name, 0.15, most)

    def draft(self, head: TokenArray) -> TokenArray:
        return self._drafts.draft_beside(self._name, head)

    def came(self, tokens: TokenArray) -> None:
        self._drafts.came(self._name, tokens)

    def end(self, prompt: TokenArray, answer: TokenArray) -> None:
        self._drafts.ends(self._name)
        self._name += 1


class Device:
    """The same choice by the length of the longest match, as `lookup_kernels` makes it."""

    def __init__(self, num_drafts: int) -> None:
        self._num = num_drafts
        self._margins = prior_margins(num_drafts).numpy().astype(np.int64)
        self._buffer = AnswerBuffer(REGION_TOKENS, REGION_TOKENS)
        self._answers = np.full(REGION_TOKENS, END, np.int32)
        self._text = np.empty(0, np.int32)
        self._both: tuple[int, TokenArray, TokenArray] | None = None

    def conversation(self) -> None:
        pass

    def begin(self, text: TokenArray) -> None:
        self._text, self._both = text, None

    def _find(self) -> tuple[int, TokenArray]:
        span = self._buffer.begins("agent")
        assert span is not None
        said = self._answers[span.start : span.start + span.num_tokens]
        own = self._text
        (length, place), (other, other_place) = _longest(own, own), _longest(said, own)
        self._buffer.ends("agent", own[:0], own[:0])
        if length and length >= other:
            return length, own[place + np.arange(self._num) % (len(own) - place)]
        found = said[other_place : other_place + self._num] if other else own[:0]
        end = np.flatnonzero(found == END)
        return other, found[: end[0]] if len(end) else found

    def found(self, most: int) -> TokenArray:
        return self._find()[1]

    def draft(self, head: TokenArray) -> TokenArray:
        length, found = self._find()
        mixed = np.concatenate([found, head[len(found) :]])
        self._both = (length, mixed, head) if length else None
        return mixed if length and self._margins[length] > 0 else head

    def came(self, tokens: TokenArray) -> None:
        if self._both is not None:
            length, mixed, head = self._both
            self._margins[min(length, MAX_MATCH)] += accepted(mixed, tokens)
            self._margins[min(length, MAX_MATCH)] -= accepted(head, tokens)
        self._text = np.concatenate([self._text, tokens])

    def end(self, prompt: TokenArray, answer: TokenArray) -> None:
        self._buffer.begins("agent")
        write = self._buffer.ends("agent", prompt, answer)
        if write is not None:
            self._answers[write.start : write.start + len(write.tokens)] = write.tokens


def accepted(draft: TokenArray, came: TokenArray) -> int:
    """How many tokens of a draft came."""
    num = min(len(draft), len(came))
    return int((draft[:num] == came[:num]).cumprod().sum())


def replay(
    said: list[Said], side: Engine | Device, head: Head, num_drafts: int, *, is_alone: bool
) -> tuple[int, int]:
    """Accepted tokens and steps of all answers."""
    num_accepted = num_steps = 0
    for conversation in said:
        side.conversation()
        text = np.empty(0, np.int32)
        for prompt, answer in conversation:
            text = np.concatenate([text, prompt])
            side.begin(text)
            head.begin(len(answer))
            done = 0
            while done < len(answer):
                proposed = head.draft(answer, done, side.found(num_drafts))
                draft = side.draft(proposed)
                right = accepted(proposed if is_alone else draft, answer[done:])
                emitted = answer[done : done + right + 1]
                side.came(emitted)
                num_accepted += right
                num_steps += 1
                done += len(emitted)
            side.end(text, answer)
            text = np.concatenate([text, answer])
    return num_accepted, num_steps


def main(arguments: Sequence[str]) -> int:
    """Print one table for each number of drafts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "models" / "smollm2-135m")
    parser.add_argument("--sources", nargs="+", default=list(SOURCES))
    parser.add_argument("--drafts", nargs="+", type=int, default=[1, 3, 5])
    args = parser.parse_args(arguments)
    encode = next(iter(tokenizers(args.model).values()))
    for num_drafts in args.drafts:
        print(f"{num_drafts} drafts: accepted tokens a step of the head, times with the session")
        print("source".ljust(16) + "side".ljust(8) + "".join(name.rjust(14) for name in HEADS))
        for source in args.sources:
            rows = list(_rows(args.traces / f"text_dev_{source}.jsonl"))
            said = [list(turns(row, encode)) for row in rows]
            for side in (Engine, Device):
                cells = [compared(said, side, chances, num_drafts) for chances in HEADS.values()]
                name = side.__name__.lower()
                print(source.ljust(16) + name.ljust(8) + "".join(cells), flush=True)
    return 0


def compared(
    said: list[Said], side: type[Engine | Device], chances: tuple[float, float], num_drafts: int
) -> str:
    """One cell: of the head alone, and the times with a session beside it."""
    (alone, alone_steps), (both, both_steps) = (
        replay(said, side(num_drafts), Head(chances, num_drafts), num_drafts, is_alone=is_alone)
        for is_alone in (True, False)
    )
    before, after = alone / alone_steps, both / both_steps
    return f"{before:.2f} x{after / before:.2f}".rjust(14)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
