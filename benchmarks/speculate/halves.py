# SPDX-License-Identifier: Apache-2.0
"""What the priors of drafts are worth on text that they were not fitted on.

    python -m benchmarks.speculate.halves [--traces FOLDER]

The chances that drafting starts from (``PRIORS``) were chosen with all recorded sources in view.
Here they are fitted on half of the sources and judged on the other half, both ways: tokens per
verified step, and tokens drafted per accepted one, as in ``benchmarks.speculate``. Beside them the
shipped priors, priors fitted on the source itself (which no server can have), and none: every
class begins with the same chance. All of them learn while they draft, as a server does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.models import ROOT
from benchmarks.serving.recorded import _rows
from benchmarks.speculate.__main__ import SOURCES, Encode, Figures, Lookup, tokenizers, turns
from vllm_stateful.speculate.drafts import (
    AGREEMENTS,
    LENGTHS,
    PLACES,
    PRIOR_WEIGHT,
    PRIORS,
    Acceptance,
    Draft,
    Floats,
)
from vllm_stateful.speculate.earlier_answers import EarlierAnswers
from vllm_stateful.types import TokenArray

LEAST_CHANCE = 0.3
FIT_CHANCE = 0.05
"""Drafts are long where priors are fitted, so that all classes are seen."""
HALVES = (SOURCES[::2], SOURCES[1::2])
SAME = 0.5
"""The chance of every class where there are no priors."""

Source = list[list[tuple[TokenArray, TokenArray]]]
"""Conversations: what the client adds, and the answer, turn by turn."""


class Counted(Acceptance):
    """Chances that begin at given ones; every outcome is counted, and none is forgotten."""

    def __init__(self, chances: Floats) -> None:
        super().__init__()
        self._accepted = chances.ravel() * PRIOR_WEIGHT
        self.rates = self._accepted / self._seen
        self.seen = np.zeros(PRIORS.size)
        self.right = np.zeros(PRIORS.size)

    def saw(self, draft: Draft, came: TokenArray) -> int:
        num_right = super().saw(draft, came)
        num = min(num_right + 1, len(draft.tokens), len(came))
        for place, each in enumerate(draft.classes[:num].tolist()):
            self.seen[each] += 1
            self.right[each] += place < num_right
        return num_right


def play(source: Source, acceptance: Acceptance, least_chance: float) -> Figures:
    """Replay all conversations of a source, in their order."""
    figures, earlier = Figures(), EarlierAnswers(1 << 30)
    for conversation in source:
        method = Lookup(acceptance, least_chance, earlier)
        for prompt, answer in conversation:
            method.extend(prompt)
            figures.add(method, answer)
            method.ended(prompt, answer)
    return figures


def fitted(sources: Iterable[Source]) -> Floats:
    """The chance of each class in some sources.

    A class that was seldom seen takes the chance of its match length.
    """
    shape = (len(LENGTHS) + 1, len(AGREEMENTS) + 1, 2, len(PLACES) + 1)
    seen, right = np.zeros(shape), np.zeros(shape)
    for source in sources:
        counted = Counted(np.full(shape, SAME))
        play(source, counted, FIT_CHANCE)
        seen += counted.seen.reshape(shape)
        right += counted.right.reshape(shape)
    places = (1, 2, 3)
    by_length = (right.sum(places, keepdims=True) + 1) / (seen.sum(places, keepdims=True) + 2)
    chances: Floats = (right + PRIOR_WEIGHT * by_length) / (seen + PRIOR_WEIGHT)
    return chances


def said_in(traces: Path, source: str, encode: Encode) -> Source:
    """The recorded conversations of a source."""
    return [list(turns(row, encode)) for row in _rows(traces / f"text_dev_{source}.jsonl")]


def others_of(source: str) -> tuple[str, ...]:
    """The half of the sources that a source is not in.

    Raises:
        ValueError: there is no such source.
    """
    if source not in SOURCES:
        raise ValueError(f"no source {source}; there are {', '.join(SOURCES)}")
    return HALVES[1] if source in HALVES[0] else HALVES[0]


def fitted_without(source: str, traces: Path, encode: Encode) -> Floats:
    """The chance of each class in the half of the sources that a source is not in."""
    return fitted(said_in(traces, other, encode) for other in others_of(source))


def main(arguments: Sequence[str]) -> int:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "models" / "smollm2-135m")
    args = parser.parse_args(arguments)
    encode = next(iter(tokenizers(args.model).values()))
    said = {name: said_in(args.traces, name, encode) for name in SOURCES}
    own = [fitted([said[name] for name in half]) for half in HALVES]
    total: dict[str, Figures] = {}
    header = ("shipped", "fitted on the others", "fitted on itself", "none")
    print("source".ljust(18) + "".join(each.rjust(22) for each in header))
    for number, half in enumerate(HALVES):
        for name in half:
            priors = (PRIORS, own[1 - number], fitted([said[name]]), np.full(PRIORS.shape, SAME))
            cells = []
            for label, chances in zip(header, priors, strict=True):
                figures = play(said[name], Counted(chances), LEAST_CHANCE)
                cells.append(str(figures))
                total.setdefault(label, Figures()).include(figures)
            print(name.ljust(18) + "".join(cell.rjust(22) for cell in cells), flush=True)
    print("all".ljust(18) + "".join(str(each).rjust(22) for each in total.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
