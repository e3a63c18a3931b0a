# SPDX-License-Identifier: Apache-2.0
"""Do the turns of a session find it, when routers spread them over two replicas?

    python -m benchmarks.field.routers [--router NAME ...] [--out FILE]

Two replicas of a small model, with the plugin, behind each router in turn. Sixteen sessions of six
turns each, their id in ``X-Session-ID``. Then one replica is killed in the middle of a turn. The
client sends the turn again, and all sessions go on for two turns. Counts only; nothing is timed.
A router that is not installed is left out, and the table says so. docs/routers.md says how each one
is installed.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from benchmarks.demo.machine import ROOT, describe
from benchmarks.demo.servers import ServerFailedError
from benchmarks.field.router_play import Conversation, play_round
from benchmarks.field.router_programs import API_KEY, KINDS, Router, missing, version_of
from benchmarks.models.tiny import DEFAULT as TINY
from benchmarks.ports import HOST
from benchmarks.serving.servers import PLUGIN, Server, Settings

SESSIONS, TURNS, TURNS_AFTER = 16, 6, 2
LONG_ANSWER = 800
KILL_AT = 5
"""The pieces of text that have come when a replica is killed."""
MODEL_NAME = "tiny"
SETTINGS = Settings(
    model_name=MODEL_NAME,
    max_model_len=2048,
    arguments=("--max-num-batched-tokens", "2048", "--block-size", "32"),
    kv_gib=1,
    environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
)


class Replicas:
    """Two servers with the plugin."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self.servers: list[Server] = [self._made(0), self._made(1)]

    @property
    def ports(self) -> tuple[int, int]:
        first, second = self.servers
        return first.port, second.port

    def __enter__(self) -> Replicas:
        for server in self.servers:
            server.__enter__()
        self._wait()
        return self

    def __exit__(self, *error: Any) -> None:
        for server in self.servers:
            server.__exit__(None, None, None)

    def revive(self) -> None:
        """Put a new server in the place of one that was killed."""
        for number, server in enumerate(self.servers):
            try:
                server.check_alive()
            except ServerFailedError:
                self.servers[number] = self._made(number)
                self.servers[number].__enter__()
        self._wait()

    def kill_the_busy_one(self) -> int:
        """Kill the replica that computes at the moment, at once; its number.

        Raises:
            RuntimeError: not exactly one computes.
        """
        busy = [number for number in (0, 1) if self._num_running(number) > 0]
        if len(busy) != 1:
            raise RuntimeError(f"one replica should be busy, not {len(busy)}")
        self.servers[busy[0]].kill()
        return busy[0]

    def sessions_of(self, number: int) -> set[str]:
        """The sessions that a replica keeps."""
        url = f"http://{HOST}:{self.ports[number]}/v1/sessions"
        headers = {"Authorization": f"Bearer {API_KEY}"}
        found = httpx.get(url, headers=headers, timeout=60)
        return {str(each["session_id"]) for each in found.raise_for_status().json()["sessions"]}

    def _made(self, number: int) -> Server:
        folder = self._folder / f"replica-{number + 1}"
        folder.mkdir(parents=True, exist_ok=True)
        return Server(PLUGIN, self._model, folder, is_timed=False, settings=SETTINGS)

    def _wait(self) -> None:
        for server in self.servers:
            server.wait_until_ready()

    def _num_running(self, number: int) -> float:
        text = httpx.get(f"http://{HOST}:{self.ports[number]}/metrics", timeout=10).text
        lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def measure(router: Router, replicas: Replicas, seed: int) -> dict[str, Any]:
    """Play all sessions through a router, and count."""
    order = random.Random(seed)
    run = uuid.uuid4().hex[:8]
    conversations = [
        Conversation(router.url, MODEL_NAME, f"session-{run}-{number:02}", seed * 1000 + number)
        for number in range(SESSIONS)
    ]
    for _ in range(TURNS):
        play_round(conversations, order)
    later = [turn for each in conversations for turn in each.turns[1:]]
    echoed = {turn.echoed == each.session_id for each in conversations for turn in each.turns}
    early = Counter(error for each in conversations for turn in each.turns for error in turn.errors)

    lived = [replicas.sessions_of(number) for number in (0, 1)]
    killed: list[int] = []

    def kill(num_texts: int) -> None:
        if num_texts == KILL_AT:
            killed.append(replicas.kill_the_busy_one())

    interrupted = conversations[0].take_turn(max_tokens=LONG_ANSWER, on_text=kill)
    errors = Counter(interrupted.errors)
    play_round(conversations[1:], order)
    errors.update(error for each in conversations[1:] for error in each.turns[-1].errors)
    for _ in range(TURNS_AFTER - 1):
        play_round(conversations, order)
    homes = {each.session_id for each in conversations} & lived[killed[0]]
    cold = [sum(not turn.has_found for turn in each.turns[TURNS:]) for each in conversations]
    last = [each.turns[-1] for each in conversations]
    return {
        "later_turns": len(later),
        "found": sum(turn.has_found for turn in later),
        "prompt_tokens": sum(turn.prompt for turn in later),
        "cached_tokens": sum(turn.cached for turn in later),
        "errors_before": dict(early),
        "header_comes_back": echoed == {True},
        "sessions_on_the_killed_replica": len(homes),
        "errors_of_the_interrupted_turn": interrupted.errors,
        "errors_after_the_kill": dict(errors),
        "cold_turns_after_the_kill": sum(cold),
        "most_cold_turns_of_a_session": max(cold),
        "found_in_the_last_turn": sum(turn.has_found for turn in last),
        "errors_in_the_last_turn": sum(len(turn.errors) for turn in last),
    }


def table(results: dict[str, Any]) -> str:
    """The results as a table of Markdown."""
    head = (
        "router",
        "turns that found their session",
        "prompt tokens cached",
        "errors after the kill",
        "sessions there",
        "cold turns",
        "found in the last turn",
    )
    rows = [head, tuple("---" for _ in head)]
    for name, found in results.items():
        if "left_out" in found:
            rows.append((name, found["left_out"], *[""] * (len(head) - 2)))
            continue
        errors = ", ".join(f"{n} × {what}" for what, n in found["errors_after_the_kill"].items())
        share = found["found"] / found["later_turns"]
        cached = found["cached_tokens"] / found["prompt_tokens"]
        rows.append(
            (
                name,
                f"{found['found']} of {found['later_turns']} ({share:.0%})",
                f"{cached:.0%}",
                errors or "none",
                f"{found['sessions_on_the_killed_replica']}",
                f"{found['cold_turns_after_the_kill']}",
                f"{found['found_in_the_last_turn']} of {SESSIONS}",
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.field.routers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--router", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--model", type=Path, default=TINY, help="Default: the tiny model.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, default=ROOT / "out" / "routers")
    parser.add_argument("--out", type=Path, help="the results as JSON go here")
    return parser.parse_args()


def main() -> int:
    """Measure the routers that are installed; 1 when none is."""
    arguments = _arguments()
    results: dict[str, Any] = {}
    arguments.logs.mkdir(parents=True, exist_ok=True)
    left_out = {name: missing(name) for name in arguments.router}
    if all(left_out.values()):
        print("\n".join(f"{name}: {why}" for name, why in left_out.items()), file=sys.stderr)
        return 1
    with Replicas(arguments.model, arguments.logs) as replicas:
        for name in arguments.router:
            why = left_out[name]
            if why is not None:
                results[name] = {"left_out": why}
                continue
            replicas.revive()
            try:
                with Router(name, replicas.ports, MODEL_NAME, arguments.logs) as router:
                    found = measure(router, replicas, arguments.seed)
            except (ServerFailedError, RuntimeError) as error:
                print(error, file=sys.stderr)
                results[name] = {"left_out": "failed: " + str(error).partition(". ")[0]}
                continue
            results[name] = {"version": version_of(name), **found}
            print(name, json.dumps(results[name]), flush=True)
    print(table(results))
    if arguments.out is not None:
        command = "python -m benchmarks.field.routers " + shlex.join(sys.argv[1:])
        setup = {"sessions": SESSIONS, "turns": TURNS, "turns_after": TURNS_AFTER, "replicas": 2}
        made = {**describe(), "command": command, "setup": setup, "routers": results}
        arguments.out.write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
