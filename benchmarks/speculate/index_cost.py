# SPDX-License-Identifier: Apache-2.0
"""What drafting costs the host for each decoded token, behind a long history, and its memory.

    python -m benchmarks.speculate.index_cost [--history 100000] [--traces FOLDER]

The recorded coding session is indexed up to that many tokens; the answers behind it are decoded
with the drafts that they get, one token a step where nothing is drafted.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.models import ROOT
from benchmarks.serving.recorded import _rows
from benchmarks.serving.tables import markdown, percentile
from benchmarks.speculate.__main__ import tokenizers, turns
from vllm_stateful.speculate.session_drafts import SessionDrafts
from vllm_stateful.types import TokenArray

LEAST_CHANCES = (0.15, 0.4, 0.9, 1.0)
"""As for one turn, for several, and for many; at 1 no draft is worth it, and none is looked for."""


def decode(
    drafts: SessionDrafts, name: str, answer: TokenArray, least: float
) -> tuple[float, float, int]:
    """Seconds of learning what came and of drafting, and steps."""
    came_s = draft_s = 0.0
    done = num_steps = 0
    draft = np.empty(0, np.int32)
    while done < len(answer):
        rest = answer[done : done + len(draft)]
        differ = np.flatnonzero(draft[: len(rest)] != rest)
        num_right = int(differ[0]) if len(differ) else len(rest)
        new = answer[done : done + num_right + 1]
        started = time.perf_counter()
        drafts.came(name, new)
        middle = time.perf_counter()
        draft = drafts.draft(name, least)
        draft_s += time.perf_counter() - middle
        came_s += middle - started
        done += len(new)
        num_steps += 1
    return came_s, draft_s, num_steps


def main() -> int:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "models" / "smollm2-135m")
    parser.add_argument("--history", type=int, default=100_000)
    parser.add_argument("--answers", type=int, default=40)
    args = parser.parse_args()
    encode = next(iter(tokenizers(args.model).values()))
    (row,) = _rows(args.traces / "text_dev_pi-mono.jsonl")
    said = list(turns(row, encode))
    tokens = np.concatenate([part for pair in said for part in pair])
    answers = [answer for _, answer in said[-args.answers :]]
    lines = []
    for least in LEAST_CHANCES:
        drafts = SessionDrafts(1 << 30)
        times = []
        drafts.begins("warm", "warm", "agent", tokens[:2000])
        decode(drafts, "warm", answers[0][:50], 0.0)
        drafts.ends("warm")
        history = np.resize(tokens, args.history)
        started = time.perf_counter()
        drafts.begins("turn", "session", "agent", history)
        began_ms = (time.perf_counter() - started) * 1000
        for answer in answers:
            came_s, draft_s, num_steps = decode(drafts, "turn", answer, least)
            times.append(
                (1e6 * (came_s + draft_s) / len(answer), 1e6 * draft_s / num_steps, len(answer))
            )
        index = drafts._running["turn"].index
        per_token = sum(each[0] * each[2] for each in times) / sum(each[2] for each in times)
        lines.append(
            [
                f"{least}",
                f"{per_token:.1f}",
                f"{percentile([each[1] for each in times], 0.5):.1f}",
                f"{began_ms:.0f}",
                f"{index.num_bytes / len(index):.1f}",
            ]
        )
    head = ["least chance", "us a decoded token", "us a draft", "ms to index all", "bytes a token"]
    print(markdown(head, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
