# SPDX-License-Identifier: Apache-2.0
"""Recorded conversations for `benchmarks.gpu.serving`, and excerpts small enough to be packed.

    python -m benchmarks.gpu.serving_text TRACES OUT

writes two files of together about 300 kB to OUT, for `pack_vllm --traces`. The traces are not part
of this repository; their licences, MIT for these two, are named in each row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.serving.agents_load import TEMPLATE_TOKENS, service
from benchmarks.serving.recorded import Conversation, Message, Step, conversations, texts

SERVICE, CODING = "taubench", "pi-mono"
NUM_SERVICE = 7  # of an excerpt
CODING_MESSAGES = slice(373, 573)
"""From a question on. Before it stands an answer of 3,821 tokens, which nobody waits for here."""
LONGEST = 8000  # tokens of a conversation with its answers
CODING_TURNS, MOST_CODING_ANSWER = 8, 220
DELTA_TOKENS, ANSWER_TOKENS = 700, 24
MOST_PINNED = 1000
MIN_CHARS = 40
_END = "<|im_end|>"


class Tokens:
    """The token ids of texts."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._counts: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def count(self, text: str) -> int:
        if text not in self._counts:
            self._counts[text] = len(self.ids(text))
        return self._counts[text]

    def answer(self, text: str) -> list[int]:
        """What the model has to say, its end too."""
        return self.ids(text + _END)

    def cut(self, text: str, num_tokens: int) -> str:
        """The beginning of a text, in whole words where it has any."""
        words = text.split(" ")
        low, high = 1, len(words)
        while low < high:
            middle = (low + high + 1) // 2
            is_short = len(self.ids(" ".join(words[:middle]))) <= num_tokens
            low, high = (middle, high) if is_short else (low, middle - 1)
        return " ".join(words[:low])


@dataclass(frozen=True)
class Turn:
    """What is new in a prompt, and what the model is made to say."""

    new: tuple[Message, ...]
    answer: str


@dataclass(frozen=True)
class Talk:
    """A conversation: a system message and turns."""

    kind: str
    name: str
    system: Message
    turns: tuple[Turn, ...]

    def named(self, run: str) -> Talk:
        """The same with a first line of its own, so that it shares nothing with other runs."""
        content = f"Run {run}.\n\n{self.system['content']}"
        return replace(self, system={**self.system, "content": content})


@dataclass(frozen=True)
class Texts:
    """All that is played."""

    long: Talk
    agents: tuple[Talk, ...]
    together: tuple[Talk, ...]


def load(
    folder: Path, tokens: Tokens, context: int, num_turns: int, num_together: int, longest: int
) -> Texts:
    """Talks out of the recorded files in a folder.

    Args:
        context: Tokens before the first short turn of the long one.
        num_turns: Its short turns.
        num_together: Talks at once. Where fewer were recorded they come again, and differ from
            their first message on: like agents with the same tools.
        longest: Tokens of any other talk.
    """
    served = [
        _talk(SERVICE, each) for each in service(folder, tokens.count, longest, 100).conversations
    ]
    coded = list(_coding(folder, tokens, longest))
    pairs = [pair[place] for pair in zip(served, coded, strict=False) for place in (0, 1)]
    rest = served[len(coded) :] + coded[len(served) :]
    together = tuple(
        _starting_with(talk, f"Case {number}.")
        for number, talk in zip(range(num_together), cycle(served), strict=False)
    )
    return Texts(_long(folder, tokens, context, num_turns), (*pairs, *rest), together)


def _talk(kind: str, talk: Conversation) -> Talk:
    turns = tuple(Turn(step.new_messages, step.answer) for step in talk.steps)
    return Talk(kind, talk.name, talk.system, turns)


def _starting_with(talk: Talk, text: str) -> Talk:
    first, *later = talk.turns
    (message, *more) = first.new
    message = {**message, "content": f"{text} {message['content']}"}
    return replace(talk, turns=(replace(first, new=(message, *more)), *later))


def _coding(folder: Path, tokens: Tokens, longest: int) -> Iterator[Talk]:
    """Pieces of a long coding session between answers that take too long to be decoded.

    The first prompt of each holds what was said before, as far back as fits.
    """
    found = conversations(folder, [CODING], tokens.count, max_answer_tokens=MOST_PINNED)
    for session in found:
        sizes = [_size(step, tokens) for step in session.steps]
        start = 0
        for end, step in enumerate([*session.steps, None]):
            is_long = step is not None and tokens.count(step.answer) > MOST_CODING_ANSWER
            if not (step is None or is_long or end - start == CODING_TURNS):
                continue
            if end - start >= CODING_TURNS // 2:
                room, begin = longest - sum(sizes[start:end]), start
                while begin and sizes[begin - 1] <= room:
                    begin -= 1
                    room -= sizes[begin]
                told = _told(session.steps[begin:start])
                first, *later = session.steps[start:end]
                first = replace(first, new_messages=(*told, *first.new_messages))
                name = f"{session.name}-{start}"
                yield _talk(CODING, replace(session, name=name, steps=(first, *later)))
            start = end + 1 if is_long else end


def _size(step: Step, tokens: Tokens) -> int:
    """With what the template puts around each message."""
    said = [message["content"] for message in step.new_messages] + [step.answer]
    return sum(tokens.count(text) + TEMPLATE_TOKENS for text in said)


def _told(steps: Sequence[Step]) -> Iterator[Message]:
    """As messages."""
    for step in steps:
        yield from step.new_messages
        yield {"role": "assistant", "content": step.answer}


def _long(folder: Path, tokens: Tokens, context: int, num_turns: int) -> Talk:
    """An agent that has read so much, and then gets results of about 700 tokens."""
    pieces = _pieces(folder, tokens)
    system = {"role": "system", "content": "You are an agent. Read what the tools return."}
    new: list[Message] = [{"role": "user", "content": "Read all of it."}]
    left = context
    while left > 2 * DELTA_TOKENS:
        told = next(pieces)
        new += [{"role": "assistant", "content": "Next."}, {"role": "tool", "content": told}]
        left -= tokens.count(told) + 2 * TEMPLATE_TOKENS
    turns = []
    for number in range(num_turns + 1):
        said = tokens.cut(f"Part {number}: {next(pieces)}", ANSWER_TOKENS - 1).strip()
        turns.append(Turn(tuple(new), said))
        new = [{"role": "tool", "content": next(pieces)}]
    return Talk("long", f"{context} tokens", system, tuple(turns))


def _pieces(folder: Path, tokens: Tokens) -> Iterator[str]:
    """Recorded text in pieces of about 700 tokens, without end."""
    found = [*texts(folder, CODING, MIN_CHARS), *texts(folder, SERVICE, MIN_CHARS)]
    gathered: list[str] = []
    size = 0
    for number, text in enumerate(cycle(found)):
        cut = tokens.cut(text, DELTA_TOKENS)
        gathered.append(cut)
        size += tokens.count(cut)
        if size >= DELTA_TOKENS - 60:
            yield tokens.cut(f"[{number}] " + "\n".join(gathered), DELTA_TOKENS)
            gathered, size = [], 0


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Those of a recorded file."""
    with path.open() as file:
        yield from map(json.loads, file)


def excerpt(traces: Path, out: Path) -> list[Path]:
    """A few conversations of each file that is used here."""
    name = "text_dev_{}.jsonl".format
    served = [row for row in rows(traces / name(SERVICE)) if row["id"].endswith("-r0")]
    coded = [
        {**row, "messages": row["messages"][CODING_MESSAGES], "msg_t": None}
        for row in rows(traces / name(CODING))
    ]
    out.mkdir(parents=True, exist_ok=True)
    kept: Mapping[str, Sequence[dict[str, Any]]] = {SERVICE: served[:NUM_SERVICE], CODING: coded}
    made = []
    for source, chosen in kept.items():
        path = out / name(source)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))
        made.append(path)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("traces", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    for path in excerpt(args.traces, args.out):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
