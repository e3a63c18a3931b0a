# SPDX-License-Identifier: Apache-2.0
"""Where drafts lose tokens in long sessions that the priors have not seen.

    python -m benchmarks.speculate.lost [--sources pi-mono,intercode] [--each 2]

The sessions of ``benchmarks.serving.bench_unseen`` are replayed as its server has them: the same
prompts, drafts of at most 16 tokens, none behind a prompt, and an agent that nobody has met. Drafts
start from the chances that were fitted on the other half of the sources, or from the shipped ones.
No model runs.

Printed for each least chance are tokens per step / drafted per accepted. Then, for one of them, how
each step ended, in percent of the steps: behind a prompt; without a draft, as the last token has
not come before, or as what followed it is unlikely; with a wrong first token, with a wrong later
one, or with a draft that was right to its end.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.models import ROOT
from benchmarks.serving import replay
from benchmarks.serving.agents_load import LongSession, long_sessions
from benchmarks.serving.bench_agents import MAX_LEN, PLUGIN_CONFIG
from benchmarks.serving.bench_unseen import OTHER_HALF, SHIPPED
from benchmarks.serving.recorded import rendered
from benchmarks.serving.replay import Tokens
from benchmarks.speculate import halves, priors
from vllm_stateful.speculate.session_drafts import SessionDrafts
from vllm_stateful.types import TokenArray

SOURCES = ("pi-mono", "lmcache-miniswe", "intercode")
"""Those that have sessions of 35 turns which fit the model."""
CHANCES = (0.4, 0.3, 0.2, 0.15)
ENDS_OF = 0.2
"""The least chance of which the ends of steps are counted."""
MAX_TOKENS = PLUGIN_CONFIG["num_speculative_tokens"]
PROMPT, NEW, UNLIKELY = "prompt", "new", "unlikely"
FIRST, LATER, RIGHT = "first wrong", "later wrong", "all right"
ENDS = (PROMPT, NEW, UNLIKELY, FIRST, LATER, RIGHT)

Turn = tuple[TokenArray, TokenArray]
"""A whole prompt, and its answer."""


def turns_of(session: LongSession, tokens: Tokens) -> Iterator[Turn]:
    """Each turn as the server gets it."""
    messages = [session.conversation.system]
    for step in session.conversation.steps:
        messages += step.new_messages
        prompt = np.array(tokens.ids(rendered(messages)), np.int32)
        answer = tokens.pinned(replay.IDS, step.answer)["vllm_xargs"]["pinned_ids"]
        yield prompt, np.array(answer, np.int32)
        messages.append({"role": "assistant", "content": step.answer})


def play(turns: Sequence[Turn], least_chance: float) -> tuple[halves.Figures, Counter[str]]:
    """Totals of one session, and how its steps ended."""
    drafts, figures, ends = SessionDrafts(1 << 30), halves.Figures(), Counter[str]()
    for prompt, answer in turns:
        drafts.begins("turn", "session", "agent", prompt)
        drafts.came("turn", answer[:1])
        ends[PROMPT] += 1
        figures.steps += 1
        done = 1
        while done < len(answer):
            draft = drafts.draft("turn", least_chance, MAX_TOKENS)
            rest = answer[done : done + len(draft)]
            num = int((draft[: len(rest)] == rest).cumprod().sum())
            ends[_end(len(draft), num, len(rest)) or _why_none(drafts)] += 1
            came = answer[done : done + num + 1]
            drafts.came("turn", came)
            done += len(came)
            figures.steps += 1
            figures.drafted += len(draft)
            figures.accepted += num
        figures.tokens += len(answer)
        drafts.ends("turn")
    return figures, ends


def _end(num_drafted: int, num_right: int, num_left: int) -> str:
    if not num_drafted:
        return ""
    if num_right == num_left:
        return RIGHT
    return LATER if num_right else FIRST


def _why_none(drafts: SessionDrafts) -> str:
    found = drafts.draft("turn", 0.0, 1)
    drafts.withdraw("turn")
    return UNLIKELY if len(found) else NEW


def main(arguments: Sequence[str]) -> int:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "models" / "smollm2-135m")
    parser.add_argument("--sources", type=replay.names, default=SOURCES)
    parser.add_argument("--priors", choices=(OTHER_HALF, SHIPPED), default=OTHER_HALF)
    parser.add_argument("--each", type=int, default=2, help="most sessions of a source")
    args = parser.parse_args(arguments)
    tokens = Tokens(args.model)
    print("session".ljust(46) + "".join(f"{chance}".rjust(14) for chance in CHANCES), end="")
    print("".join(end.rjust(13) for end in ENDS))
    for source in args.sources:
        if args.priors == OTHER_HALF:
            priors.use(halves.fitted_without(source, args.traces, tokens.ids))
        for session in long_sessions(args.traces, source, tokens.count, MAX_LEN)[: args.each]:
            turns = list(turns_of(session, tokens))
            cells = [str(play(turns, chance)[0]).rjust(14) for chance in CHANCES]
            _, ends = play(turns, ENDS_OF)
            cells += [f"{100 * ends[end] / ends.total():.0f}".rjust(13) for end in ENDS]
            print(session.conversation.name[-44:].ljust(46) + "".join(cells), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
