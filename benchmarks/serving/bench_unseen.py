# SPDX-License-Identifier: Apache-2.0
"""Sessions of 35 turns whose source the chances that drafts start from were not fitted on.

    python -m benchmarks.serving.bench_unseen --compiled --cores 0-1
    python -m benchmarks.serving.bench_unseen --priors shipped --sessions pi-mono:1

The shipped chances were chosen with all recorded sources in view. Here the plugin's server starts
from those that ``benchmarks.speculate.halves`` fits on the half of the sources that a session's
source is not in (``primed_server``). Only drafts in the engine core start from them, so this is for
CPUs. Each session is an agent of its own, so no server has met its answers. Turns are played as in
``bench_agents``, in replay.

One recorded session has 35 turns or more. Other sources take part with their conversations joined,
as of a user who goes on with the next task.
"""

import argparse
import dataclasses
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import httpx
import numpy as np

from benchmarks.demo import machine
from benchmarks.demo.servers import ServerFailedError
from benchmarks.serving import agents_report as report
from benchmarks.serving import bench_agents, primed_server, recorded, replay
from benchmarks.serving.agents_load import (
    CODING_TURNS,
    LongSession,
    Workload,
    long_sessions,
    one_by_one,
)
from benchmarks.serving.agents_play import REPLAY, Drafts, Sample
from benchmarks.serving.agents_report import SIDES, Row
from benchmarks.serving.bench_agents import MAX_LEN, say
from benchmarks.serving.client import RequestFailedError
from benchmarks.serving.pressure_play import warm_up
from benchmarks.serving.replay import Tokens
from benchmarks.serving.servers import PLUGIN, STOCK, Server, running_servers
from benchmarks.serving.tables import markdown, save
from benchmarks.speculate import halves

OTHER_HALF, SHIPPED = "other-half", "shipped"
PRIORS = (OTHER_HALF, SHIPPED)
SESSIONS = "pi-mono:2,lmcache-miniswe:1,intercode:1"
"""What fits into 8,192 tokens, from the sources that have it."""
QUICK = {"model": replay.SMALL, "sessions": "intercode:1", "turns": 4}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Attributes of the result:
        sessions: how many of each source, by its name.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    replay.add_options(parser, model=replay.SMOLLM2, out="unseen.json")
    add = parser.add_argument
    add("--sessions", type=_numbers, default=SESSIONS, help="SOURCE:NUMBER,... (%(default)s)")
    add("--priors", choices=PRIORS, default=OTHER_HALF, help="(%(default)s)")
    add("--sides", type=replay.names, default=(STOCK, PLUGIN), help="comma-separated (both)")
    add("--turns", type=int, default=CODING_TURNS, help="of each session (%(default)s)")
    add("--compiled", action="store_true", help="let vLLM compile the model (it is run eagerly)")
    parser.set_defaults(modes=(REPLAY,), ngram_lookup="2,5", ngram_tokens=5)
    args = replay.parse_quick(parser, arguments, QUICK)
    if PLUGIN not in args.sides or set(args.sides) - set(SIDES):
        parser.error(f"--sides are {PLUGIN} and others of {', '.join(SIDES)}")
    if args.model == replay.LLAMA_8B:
        parser.error("on a GPU drafts start from other chances")
    return args


def _numbers(text: str) -> dict[str, int]:
    made = {}
    for each in text.split(","):
        source, _, number = each.partition(":")
        halves.others_of(source)
        made[source] = int(number or 1)
    return made


def chosen(args: argparse.Namespace, tokens: Tokens) -> list[LongSession]:
    """The shortest sessions of each source.

    Raises:
        ValueError: a source has fewer that fit the model.
    """
    found: list[LongSession] = []
    for source, number in args.sessions.items():
        have = long_sessions(args.traces, source, tokens.count, MAX_LEN, args.turns)
        if len(have) < number:
            raise ValueError(f"{source} has {len(have)} sessions of {args.turns} turns that fit")
        found += have[:number]
    return found


def measure(
    args: argparse.Namespace, sessions: Sequence[LongSession], tokens: Tokens
) -> tuple[list[Sample], list[Drafts]]:
    """All sessions; the plugin's server starts anew for those of the other half."""
    model = replay.model_folder(args.model)
    by_half: dict[tuple[str, ...], list[LongSession]] = {}
    for session in sessions:
        by_half.setdefault(halves.others_of(session.source), []).append(session)
    args.logs.mkdir(parents=True, exist_ok=True)
    settings = bench_agents.settings(args)
    others = [side for side in args.sides if side != PLUGIN]
    samples: list[Sample] = []
    drafts: list[Drafts] = []
    with running_servers(model, args.logs, say, settings=settings, sides=others) as common:
        _warm_up(common, tokens)
        for half, mine in by_half.items():
            primed, line = settings, ""
            if args.priors == OTHER_HALF:
                path = _fit(half, args, tokens)
                line = primed_server.said(path)
                launcher = (primed_server.__name__, str(path))
                primed = dataclasses.replace(settings, launchers={PLUGIN: launcher})
            with running_servers(model, args.logs, say, settings=primed, sides=[PLUGIN]) as servers:
                _check(servers[PLUGIN], line)
                _warm_up(servers, tokens)
                for session in mine:
                    played, drafted = _play(common | servers, tokens, session, f"{args.seed}")
                    samples += played
                    drafts += drafted
    return samples, drafts


def _fit(half: Sequence[str], args: argparse.Namespace, tokens: Tokens) -> Path:
    """The file with the chances that some sources have."""
    say(f"fitting on {', '.join(half)}")
    made = halves.fitted(halves.said_in(args.traces, source, tokens.ids) for source in half)
    path: Path = args.logs / f"priors-{half[0]}.npy"
    np.save(path, made)
    return path


def _check(plugin: Server, line: str) -> None:
    """That the chances reached the engine core."""
    if line not in plugin.log.read_text(errors="replace"):
        raise ServerFailedError(plugin.report(f"its engine core did not say: {line}"))


def _warm_up(servers: Mapping[str, Server], tokens: Tokens) -> None:
    for server in servers.values():
        warm_up(server.port, partial(tokens.pinned, replay.IDS))


def _play(
    servers: Mapping[str, Server], tokens: Tokens, session: LongSession, run: str
) -> tuple[list[Sample], list[Drafts]]:
    conversation = (session.conversation,)
    about = f"{len(session.conversation.steps)} turns of {session.source}"
    workload = Workload(session.conversation.name, about, conversation, one_by_one(conversation))
    try:
        return bench_agents.play(servers, tokens, workload, REPLAY, run)
    except (OSError, httpx.HTTPError, RequestFailedError) as error:
        reports = [server.report(str(error)) for server in servers.values()]
        raise ServerFailedError("\n".join(reports)) from error


def fitted_on(session: LongSession, priors: str) -> tuple[str, ...]:
    """The sources that the plugin's chances were fitted on."""
    return halves.SOURCES if priors == SHIPPED else halves.others_of(session.source)


def table(rows: Sequence[Row], sessions: Sequence[LongSession], priors: str) -> str:
    """One line for each session; times in seconds, ratios of medians and of the sums."""
    by_name = {session.conversation.name: session for session in sessions}
    sides = list(rows[0].total_ms) if rows else []
    others = [side for side in sides if side != PLUGIN]
    head = ["source", "in the fit", "from turn", "recorded conversations in it", "turns"]
    head += [f"{side}: median / p90 / p99 (s)" for side in sides]
    head += [f"{side} / plugin: median / all" for side in others]
    head += ["TTFT " + " / ".join(sides) + " (s)"]
    head += [f"tokens a step, {side} (drafted for each accepted)" for side in sides[1:]]
    lines = []
    for row in rows:
        session = by_name[row.workload]
        is_fitted = session.source in fitted_on(session, priors)
        first = row.workload.rpartition("-")[2]
        line = [session.source, "yes" if is_fitted else "no", first]
        line += [str(session.num_recorded), str(row.num_turns)]
        line += [" / ".join(f"{ms / 1000:.2f}" for ms in row.total_ms[side]) for side in sides]
        line += [" / ".join(f"{each:.2f}" for each in ratios(row, side)) for side in others]
        line += [" / ".join(f"{row.ttft_ms[side] / 1000:.2f}" for side in sides)]
        line += [
            f"{row.tokens_per_step[side]:.2f} ({row.drafted_per_accepted[side]:.2f})"
            for side in sides[1:]
        ]
        lines.append(line)
    return markdown(head, lines)


def ratios(row: Row, side: str) -> tuple[float, float]:
    """How many times the plugin's a side's median turn takes, and all its turns."""
    median = row.total_ms[side][0] / row.total_ms[PLUGIN][0]
    return median, row.all_ms[side] / row.all_ms[PLUGIN]


def summary(rows: Sequence[Row]) -> list[str]:
    """For each side but the plugin, least, mean and most of the sessions' ratios."""
    lines = []
    for side in [side for side in rows[0].total_ms if side != PLUGIN] if rows else []:
        for place, what in enumerate(("median turn", "all turns")):
            found = [ratios(row, side)[place] for row in rows]
            text = (
                f"{min(found):.2f} to {max(found):.2f}, geometric mean {geometric_mean(found):.2f}"
            )
            lines.append(f"{side} / plugin, {what}: {text}")
    return lines


def described(session: LongSession, priors: str) -> dict[str, Any]:
    """A session, for the results."""
    return {
        "name": session.conversation.name,
        "source": session.source,
        "num_turns": len(session.conversation.steps),
        "num_recorded": session.num_recorded,
        "num_tokens": session.num_tokens,
        "priors_fitted_on": list(fitted_on(session, priors)),
        "is_in_the_fit": session.source in fitted_on(session, priors),
    }


def main() -> int:
    """Measure, print the table, write the file."""
    args = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # stops the servers too
    command = f"python -m benchmarks.serving.bench_unseen {shlex.join(sys.argv[1:])}".strip()
    about = machine.describe() | {"command": command, "options": replay.written(args)}
    try:
        tokens = Tokens(replay.model_folder(args.model))
        sessions = chosen(args, tokens)
        samples, drafts = measure(args, sessions, tokens)
    except (recorded.NoTracesError, ServerFailedError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    rows = report.make_rows(samples, drafts)
    say(f"\n{table(rows, sessions, args.priors)}")
    for line in [*summary(rows), *report.faults(samples, rows)]:
        say(line)
    known = {"sessions": [described(session, args.priors) for session in sessions]}
    save(args.out, report.document(about | known, rows, drafts), samples)
    say(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
