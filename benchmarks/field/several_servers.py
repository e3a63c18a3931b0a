# SPDX-License-Identifier: Apache-2.0
"""Many sessions at once on several API servers, and on several engine cores of one server.

    python -m benchmarks.field.several_servers [--case NAME ...] [--out FILE]

64 sessions of six turns each, 16 of them at once; every turn comes over a connection of its own, so
the kernel deals the turns of a session out to the API servers. Half of the sessions have an id in
``X-Session-ID``, and nothing names the others. Then each session's last turn is sent once more, as
it was: the response cache may answer it. Stock vLLM, one API server and one engine core, says what
the answers are (fp32, greedy). Counted are:

- wrong answers, and requests that failed;
- turns that found the whole prompt of the turn before;
- turns, answers from the response cache and requests as ``/metrics`` has them: the first two
  together are the requests that were sent;
- turns in ``/v1/sessions/{id}/turns`` of the sessions with an id, asked for over a new connection.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from benchmarks.demo.machine import ROOT, describe
from benchmarks.field.router_play import Conversation
from benchmarks.field.router_programs import API_KEY
from benchmarks.models.tiny import DEFAULT as TINY
from benchmarks.serving.servers import PLUGIN, STOCK, Server, Settings
from benchmarks.serving.tables import markdown

SESSIONS, TURNS, AT_ONCE = 64, 6, 16
MODEL_NAME = "tiny"
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "stock": (STOCK, ()),
    "plugin": (PLUGIN, ()),
    "2 API servers": (PLUGIN, ("--api-server-count", "2")),
    "4 API servers": (PLUGIN, ("--api-server-count", "4")),
    "2 engine cores": (PLUGIN, ("--data-parallel-size", "2")),
    "2 engine cores, 1 API server": (
        PLUGIN,
        ("--data-parallel-size", "2", "--api-server-count", "1"),
    ),
}
"""The side, and more arguments of ``vllm serve``. The first says what the answers are."""
CACHED = ("--stateful-response-cache-bytes", "64M")


def settings(side: str, more: tuple[str, ...]) -> Settings:
    """Those of one case."""
    own = CACHED if side == PLUGIN else ()
    return Settings(
        model_name=MODEL_NAME,
        max_model_len=2048,
        arguments=("--max-num-batched-tokens", "2048", "--block-size", "32", *own, *more),
        kv_gib=1,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
    )


def conversations(url: str) -> list[Conversation]:
    """The same ones for each server; only the session ids are new."""
    run = uuid.uuid4().hex[:8]
    return [
        Conversation(
            url,
            MODEL_NAME,
            f"session-{run}-{number:02}" if number % 2 == 0 else None,
            seed=number,
            name=f"number {number}",
        )
        for number in range(SESSIONS)
    ]


def at_once(asked: list[Callable[[], Any]]) -> list[Any]:
    """The results, in order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [done.result() for done in [pool.submit(each) for each in asked]]


def measure(server: Server, right: list[list[str]] | None) -> dict[str, Any]:
    """Play all sessions, and count.

    Args:
        server: to play on, alone.
        right: the answers of each session; None for the server that says what they are.
    """
    played = conversations(server.url)
    order = random.Random(0)
    start = time.monotonic()
    for _ in range(TURNS):
        at_once([each.take_turn for each in order.sample(played, len(played))])
    seconds = time.monotonic() - start
    answers = [each.answers for each in played]
    again = at_once([each.ask_again for each in played])
    told = right or answers
    wrong = sum(
        found != wanted
        for one, other in zip(answers, told, strict=True)
        for found, wanted in zip(one, other, strict=True)
    )
    wrong += sum(text != own[-1] for text, own in zip(again, told, strict=True))
    later = [turn for each in played for turn in each.turns[1:]]
    result: dict[str, Any] = {
        "requests": SESSIONS * (TURNS + 1),
        "wrong": wrong,
        "errors": sum(len(turn.errors) for each in played for turn in each.turns),
        "later_turns": len(later),
        "found": sum(turn.has_found for turn in later),
        "found_with_an_id": sum(t.has_found for each in played[::2] for t in each.turns[1:]),
        "seconds": round(seconds, 1),
        "answers": answers,
    }
    time.sleep(3)  # the engine's totals are asked for each second
    figures = server.metrics()
    result["finished_requests"] = _sum(figures, "vllm:request_success_total")
    if server.side == PLUGIN:
        result["turns_counted"] = _sum(figures, "vllm_stateful_turns_total")
        answered = "vllm_stateful_responses_total"
        kinds = ('result="hit"', 'result="joined"')
        result["cached"] = sum(_sum(figures, answered, kind) for kind in kinds)
        named = [each for each in played if each.session_id is not None]
        listed = [_turns(server.url, str(each.session_id)) for each in named]
        result["sessions_asked"] = len(listed)
        result["sessions_with_all_turns"] = sum(_has_all(turns) for turns in listed)
    return result


def _sum(figures: dict[str, float], name: str, label: str = "") -> int:
    return int(
        sum(
            value
            for key, value in figures.items()
            if key.partition("{")[0] == name and label in key
        )
    )


def _turns(url: str, session_id: str) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    answer = httpx.get(f"{url}/v1/sessions/{session_id}/turns", headers=headers, timeout=60)
    found: list[dict[str, Any]] = answer.raise_for_status().json()["turns"]
    return found


def _has_all(turns: list[dict[str, Any]]) -> bool:
    """Whether each turn is there once; the one that was sent again may be there, too."""
    ids = [turn["request_id"] for turn in turns]
    return len(set(ids)) == len(ids) and len(ids) in (TURNS, TURNS + 1)


def table(results: dict[str, Any]) -> str:
    """The results as a table of Markdown."""
    head = (
        "servers",
        "wrong answers",
        "failed",
        "turns that found their session (with an id)",
        "from the response cache",
        "turns and cached answers in the metrics",
        "requests in the metrics",
        "sessions with all turns",
        "seconds",
    )
    rows = []
    for name, found in results.items():
        half = found["later_turns"] // 2
        is_ours = "turns_counted" in found
        rows.append(
            (
                name,
                f"{found['wrong']} of {found['requests']}",
                f"{found['errors']}",
                f"{found['found']} of {found['later_turns']} "
                f"({found['found_with_an_id']} of {half})",
                f"{found['cached']} of {SESSIONS}" if is_ours else "-",
                f"{found['turns_counted'] + found['cached']} of {found['requests']}"
                if is_ours
                else "-",
                f"{found['finished_requests']} of {found['requests']}",
                f"{found['sessions_with_all_turns']} of {found['sessions_asked']}"
                if is_ours
                else "-",
                f"{found['seconds']}",
            )
        )
    return markdown(head, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.field.several_servers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    others = list(CASES)[1:]
    parser.add_argument("--case", nargs="+", choices=others, default=others)
    parser.add_argument("--model", type=Path, default=TINY, help="Default: the tiny model.")
    parser.add_argument("--logs", type=Path, default=ROOT / "out" / "several_servers")
    parser.add_argument("--out", type=Path, help="the results as JSON go here")
    return parser.parse_args()


def main() -> int:
    """Measure stock vLLM and then each case; 1 if an answer was wrong or a request failed."""
    arguments = _arguments()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    right: list[list[str]] | None = None
    for name in (next(iter(CASES)), *arguments.case):
        side, more = CASES[name]
        folder = arguments.logs / name.replace(", ", "-").replace(" ", "-")
        folder.mkdir(exist_ok=True)
        made = Server(side, arguments.model, folder, is_timed=False, settings=settings(side, more))
        with made as server:
            server.wait_until_ready()
            found = measure(server, right)
        right = right or found["answers"]
        del found["answers"]
        results[name] = found
        print(name, json.dumps(found), flush=True)
    print(table(results))
    if arguments.out is not None:
        command = "python -m benchmarks.field.several_servers " + shlex.join(sys.argv[1:])
        setup = {"sessions": SESSIONS, "turns": TURNS, "at_once": AT_ONCE}
        document = {**describe(), "command": command, "setup": setup, "cases": results}
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any(found["wrong"] or found["errors"] for found in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
