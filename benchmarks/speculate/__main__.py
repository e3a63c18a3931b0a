# SPDX-License-Identifier: Apache-2.0
"""Tokens per verified step of recorded answers: the plugin's drafts against vLLM's ``ngram``.

    python -m benchmarks.speculate [--traces FOLDER]

With ``suffix`` as vLLM drives it, at its defaults, where arctic-inference 0.1.1 can be imported (it
is built from source; its package of suffix trees alone is enough).

Every answer of every recorded conversation is replayed: a draft is accepted as far as it equals
what was recorded. No model runs, so the figures are of the drafts alone. Each conversation keeps
one index over all of its turns. ``plugin`` has the earlier answers of the same source beside that,
in the order of the file; ``own text`` has not. ``device`` is what the plugin does on CUDA, where
`ngram` drafts its full number too: of both only the tokens a step can be compared there.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from benchmarks.models import ROOT
from benchmarks.serving.recorded import _rows
from vllm_stateful.speculate.answer_buffer import END, MAX_MATCH, REGION_TOKENS, AnswerBuffer
from vllm_stateful.speculate.compiled import compiled
from vllm_stateful.speculate.drafts import NOWHERE, Acceptance, Draft, Text, draft_of
from vllm_stateful.speculate.earlier_answers import EarlierAnswers
from vllm_stateful.speculate.lookup_index import LookupIndex
from vllm_stateful.types import TokenArray

SOURCES = (
    "taubench",
    "tau2",
    "bfcl",
    "intercode",
    "sweagent",
    "lmcache-miniswe",
    "whowhen",
    "pi-mono",
)
CHANCES = (0.4, 0.3, 0.25, 0.2)
"""Least chances of a drafted token (``draft_of``)."""

DEVICE_DRAFTS = (5, 8, 16)
"""As `ngram_gpu`, the look-up on a device drafts one number of tokens for every request."""

AGENT = "agent"
"""All conversations of one source have the same tools, or say the same things."""

Encode = Callable[[str], list[int]]


class Method(Protocol):
    """One conversation as a proposer sees it."""

    def extend(self, tokens: TokenArray) -> None: ...

    def draft(self) -> TokenArray: ...

    def saw(self, came: TokenArray) -> None: ...

    def ended(self, prompt: TokenArray, answer: TokenArray) -> None: ...


class Ngram:
    """vLLM's: the first place with the longest match of ``least`` to ``most`` tokens."""

    def __init__(self, least: int, most: int, num_drafts: int) -> None:
        from vllm.v1.spec_decode import ngram_proposer

        self._propose = ngram_proposer._find_longest_matched_ngram_and_propose_tokens
        self._options = (least, most, 1 << 20, num_drafts)
        self._tokens = np.empty(0, np.int32)
        self._num = 0

    def extend(self, tokens: TokenArray) -> None:
        end = self._num + len(tokens)
        if end > len(self._tokens):
            grown = np.empty(2 * end, np.int32)
            grown[: self._num] = self._tokens[: self._num]
            self._tokens = grown
        self._tokens[self._num : end] = tokens
        self._num = end

    def draft(self) -> TokenArray:
        found: TokenArray = self._propose(self._tokens[: self._num], *self._options)
        return found

    def saw(self, came: TokenArray) -> None:
        pass

    def ended(self, prompt: TokenArray, answer: TokenArray) -> None:
        pass


class Suffix:
    """arctic-inference's suffix trees, as ``vllm.v1.spec_decode.suffix_decoding`` drives them.

    Args:
        cache: ``SuffixDecodingCache``: of one conversation's prompts, and of all answers so far.
    """

    DEPTH, MAX_REQUESTS, FACTOR, LEAST = 24, 10_000, 1.0, 0.1
    """vLLM's defaults."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._tokens = np.empty(0, np.int32)
        self._running: int | None = None
        self._num_requests = len(cache.cached_requests)

    def extend(self, tokens: TokenArray) -> None:
        self._tokens = np.concatenate([self._tokens, tokens])
        if self._running is not None:
            self._cache.add_active_response(self._running, tokens)

    def draft(self) -> TokenArray:
        if self._running is None:
            self._running = self._num_requests
            self._cache.start_request(self._running, self._tokens)
        found = self._cache.speculate(
            self._running,
            self._tokens[-self.DEPTH :],
            max_spec_tokens=self.DEPTH,
            max_spec_factor=self.FACTOR,
            min_token_prob=self.LEAST,
        )
        return np.array(found.token_ids, np.int32)

    def saw(self, came: TokenArray) -> None:
        pass

    def ended(self, prompt: TokenArray, answer: TokenArray) -> None:
        if self._running is not None:
            self._cache.stop_request(self._running)
            self._running = None
            self._num_requests += 1


class Lookup:
    """The plugin's."""

    def __init__(
        self, acceptance: Acceptance, least_chance: float, others: EarlierAnswers | None
    ) -> None:
        self._index = LookupIndex()
        self._others = others
        self._acceptance = acceptance
        self._least_chance = least_chance
        self._draft: Draft | None = None

    def extend(self, tokens: TokenArray) -> None:
        self._index.extend(tokens)

    def draft(self) -> TokenArray:
        index, others = self._index, NOWHERE
        earlier = None if self._others is None else self._others.of(AGENT)
        if earlier is not None:
            others = Text(earlier.tokens, earlier.find_end_of(index.tokens, len(index)))
        own = Text(index.tokens, index.find())
        self._draft = draft_of(own, self._acceptance, self._least_chance, others=others)
        return self._draft.tokens

    def saw(self, came: TokenArray) -> None:
        assert self._draft is not None
        self._acceptance.saw(self._draft, came)

    def ended(self, prompt: TokenArray, answer: TokenArray) -> None:
        if self._others is not None:
            self._others.add(AGENT, prompt, answer)


class OnDevice:
    """The plugin's on CUDA: a fixed number of drafts behind the longest match.

    Args:
        num_drafts: of each step; what is not found is made up, and wrong.
        buffer: of the agent's answers.
        answers: int32, what the device has of the buffer.
    """

    def __init__(self, num_drafts: int, buffer: AnswerBuffer, answers: TokenArray) -> None:
        self._num_drafts = num_drafts
        self._buffer = buffer
        self._answers = answers
        self._text = LookupIndex()

    def extend(self, tokens: TokenArray) -> None:
        self._text.extend(tokens)

    def draft(self) -> TokenArray:
        span = self._buffer.begins(AGENT)
        assert span is not None
        said = self._answers[span.start : span.start + span.num_tokens]
        own = self._text.tokens
        length, place = _longest(own, own)
        other, other_place = _longest(said, own)
        drafts = np.full(self._num_drafts, END, np.int32)
        if length and length >= other:
            circle = np.arange(self._num_drafts) % (len(own) - place)
            drafts[:] = own[place + circle]
        elif other:
            found = said[other_place : other_place + self._num_drafts]
            drafts[: len(found)] = found
        self._buffer.ends(AGENT, own[:0], own[:0])
        return drafts

    def saw(self, came: TokenArray) -> None:
        pass

    def ended(self, prompt: TokenArray, answer: TokenArray) -> None:
        self._buffer.begins(AGENT)
        write = self._buffer.ends(AGENT, prompt, answer)
        if write is not None:
            self._answers[write.start : write.start + len(write.tokens)] = write.tokens


@compiled
def _longest(text: TokenArray, own: TokenArray) -> tuple[int, int]:
    """As ``lookup_kernels``: the length of the longest match, the newest place behind."""
    best, found = 0, 0
    for place in range(len(text) - 1, 0, -1):
        if text[place] < 0:
            continue
        length = 0
        while (
            length < min(MAX_MATCH, place, len(own))
            and text[place - 1 - length] == own[len(own) - 1 - length]
        ):
            length += 1
        if length > best:
            best, found = length, place
            if best == MAX_MATCH:
                break
    return best, found


@dataclass
class Figures:
    """Totals over answers."""

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0

    def add(self, method: Method, answer: TokenArray) -> None:
        """Replay one answer."""
        done = 0
        while done < len(answer):
            started = time.perf_counter()
            draft = method.draft()
            self.seconds += time.perf_counter() - started
            rest = answer[done : done + len(draft)]
            differ = np.flatnonzero(draft[: len(rest)] != rest)
            num = int(differ[0]) if len(differ) else len(rest)
            emitted = min(num + 1, len(answer) - done)
            method.saw(answer[done : done + emitted])
            started = time.perf_counter()
            method.extend(answer[done : done + emitted])
            self.seconds += time.perf_counter() - started
            done += emitted
            self.steps += 1
            self.drafted += len(draft)
            self.accepted += num
        self.tokens += len(answer)

    def include(self, other: Figures) -> None:
        """Add the totals of other answers."""
        for field in vars(other):
            setattr(self, field, getattr(self, field) + getattr(other, field))

    def __str__(self) -> str:
        per_step = self.tokens / self.steps
        waste = self.drafted / max(1, self.accepted)
        return f"{per_step:.2f} / {waste:.2f}"


def turns(row: dict[str, Any], encode: Encode) -> Iterator[tuple[TokenArray, TokenArray]]:
    """What the client adds, and the answer, as token ids of a ChatML rendering."""
    tools = row["tools"]
    new = "" if tools is None else f"<|im_start|>system\n{tools}<|im_end|>\n"
    for message in row["messages"]:
        text = text_of(message)
        if message["role"] != "assistant":
            new += f"<|im_start|>{message['role']}\n{text}<|im_end|>\n"
            continue
        prompt = np.array(encode(new + "<|im_start|>assistant\n"), np.int32)
        yield prompt, np.array(encode(text + "<|im_end|>"), np.int32)
        new = "\n"


def text_of(message: dict[str, Any]) -> str:
    """Content, and the calls as a Hermes model writes them."""
    text = message.get("content") or ""
    for call in message.get("tool_calls") or ():
        called = call["function"]
        text += (
            f'\n<tool_call>\n{{"name": "{called["name"]}", "arguments": '
            f"{called['arguments']}}}\n</tool_call>"
        )
    return str(text)


def tokenizers(folder: Path) -> dict[str, Encode]:
    """Two real ones: SmolLM2's, and Mistral's Tekken (which has no ids for ChatML's markers)."""
    import mistral_common
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    small = Tokenizer.from_file(str(folder / "tokenizer.json"))
    data = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    large = Tekkenizer.from_file(data)
    return {
        "SmolLM2 (49k)": lambda text: list(small.encode(text, add_special_tokens=False).ids),
        "Tekken (131k)": lambda text: large.encode(text, bos=False, eos=False),
    }


def methods() -> dict[str, Callable[[], Method]]:
    """What is compared."""
    made: dict[str, Callable[[], Method]] = {
        "ngram 5-5 x5": lambda: Ngram(5, 5, 5),
        "ngram 2-5 x5": lambda: Ngram(2, 5, 5),
        "ngram 2-5 x16": lambda: Ngram(2, 5, 16),
    }
    with contextlib.suppress(ImportError):
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        cache = SuffixDecodingCache(Suffix.DEPTH, Suffix.MAX_REQUESTS)
        made["suffix"] = lambda: Suffix(cache)
    for chance in CHANCES:
        made[f"own text {chance}"] = lambda c=chance, a=Acceptance(): Lookup(a, c, None)  # type: ignore[misc]  # noqa: B008
    for chance in CHANCES:
        made[f"plugin {chance}"] = (
            lambda c=chance, a=Acceptance(), e=EarlierAnswers(1 << 30): Lookup(a, c, e)  # type: ignore[misc]  # noqa: B008
        )
    for num_drafts in DEVICE_DRAFTS:
        buffer = AnswerBuffer(REGION_TOKENS, REGION_TOKENS)
        answers = np.full(REGION_TOKENS, END, np.int32)
        made[f"device x{num_drafts}"] = lambda n=num_drafts, b=buffer, a=answers: OnDevice(n, b, a)  # type: ignore[misc]
    return made


def main(arguments: Sequence[str]) -> int:
    """Print one table per tokenizer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "models" / "smollm2-135m")
    parser.add_argument("--sources", nargs="+", default=list(SOURCES))
    args = parser.parse_args(arguments)
    for name, encode in tokenizers(args.model).items():
        total: dict[str, Figures] = {}
        header = list(methods())
        print(f"{name}: tokens per step / drafted per accepted")
        print("source".ljust(18) + "".join(each.rjust(18) for each in header))
        for source in args.sources:
            rows = list(_rows(args.traces / f"text_dev_{source}.jsonl"))
            said = [list(turns(row, encode)) for row in rows]
            cells = []
            for label, make in methods().items():
                figures = Figures()
                for conversation in said:
                    method = make()
                    for prompt, answer in conversation:
                        method.extend(prompt)
                        figures.add(method, answer)
                        method.ended(prompt, answer)
                cells.append(str(figures))
                total.setdefault(label, Figures()).include(figures)
            print(source.ljust(18) + "".join(cell.rjust(18) for cell in cells), flush=True)
        print("all".ljust(18) + "".join(str(each).rjust(18) for each in total.values()))
        costs = [f"{1e6 * each.seconds / each.steps:.0f} us" for each in total.values()]
        print("host time a step".ljust(18) + "".join(cost.rjust(18) for cost in costs) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
