# SPDX-License-Identifier: Apache-2.0
"""Chaos: processes are stopped or killed, a disk fills up, while a server answers; stock beside it.

    python -m benchmarks.reliability.chaos [--out DIR]

Both servers get the same faults under the same load: six clients with long greedy answers, four of
them streams. A client may see an error or the right answer; never a wrong one, and never nothing
for a minute. The server has to end where stock vLLM's ends, with all of its processes, and to
answer where it does. Then a full disk under vLLM's offload tier (`chaos_disk`), where a file system
may be mounted. Exit status 1 where something is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks.models import tiny
from benchmarks.reliability import chaos_disk
from benchmarks.reliability.soak_client import Answer, Request, difference, send
from benchmarks.reliability.soak_servers import Options, SoakServer, both
from benchmarks.reliability.soak_sessions import words
from benchmarks.serving.servers import MODEL_NAME, PLUGIN, STOCK

NUM_CLIENTS = 6
MAX_TOKENS = 500
STOP_S, FREEZE_S = 5.0, 10.0
END_WITHIN_S = 60.0
UNDER_WAY_S = 30.0
OPTIONS = Options(response_cache="0", stock_api_servers=2)

Act = Callable[[SoakServer, dict[str, int]], Awaitable[None]]
"""Gets the server and its processes, looked up before: on a busy machine that takes a second."""


@dataclass
class Outcome:
    """What one fault did to one server.

    Attributes:
        under_way: answers that had not ended when the fault began.
        seen: what the clients saw: right, error, wrong, stuck.
        errors: of those, by text.
        ended_after_s: until the main process ended; None: it did not.
        alive: processes that are left where the main one ended.
        answers: whether the server answers, and right, afterwards.
    """

    fault: str
    side: str
    under_way: int = 0
    seen: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    ended_after_s: float | None = None
    exit_status: int | None = None
    alive: int = 0
    answers: bool = False

    def row(self) -> str:
        """Of the table."""
        seen = ", ".join(f"{number} {name}" for name, number in sorted(self.seen.items()))
        end = "goes on"
        if self.ended_after_s is not None:
            end = f"ends with {self.exit_status} after {self.ended_after_s:.0f} s"
            end += f", {self.alive} processes left" if self.alive else ""
        after = "yes" if self.answers else "no"
        return f"| {self.fault} | {self.side} | {self.under_way} | {seen} | {end} | {after} |"


def stop_for(name: str) -> Act:
    """SIGSTOP to a process, and SIGCONT after a while."""

    async def act(server: SoakServer, processes: dict[str, int]) -> None:
        pid = processes[name]
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(STOP_S)
        finally:
            os.kill(pid, signal.SIGCONT)

    return act


def kill(name: str) -> Act:
    """SIGKILL to a process."""

    async def act(server: SoakServer, processes: dict[str, int]) -> None:
        os.kill(processes[name], signal.SIGKILL)

    return act


async def kill_busiest_api_server(server: SoakServer, processes: dict[str, int]) -> None:
    """SIGKILL to the API server that has most of the clients; the kernel deals them out."""
    pids = [pid for name, pid in processes.items() if name.startswith("api")]
    os.kill(max(pids, key=lambda pid: _num_clients(pid, server.port)), signal.SIGKILL)


def _num_clients(pid: int, port: int) -> int:
    held = psutil.Process(pid).net_connections("tcp")
    return sum(c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in held)


async def nothing(server: SoakServer, processes: dict[str, int]) -> None:
    """The fault is on the client's side."""


ROUNDS: tuple[tuple[tuple[str, Act], ...], ...] = (
    (
        ("engine core stopped for 5 s", stop_for("engine 0")),
        ("API server stopped for 5 s", stop_for("api 0")),
        ("a client frozen for 10 s", nothing),
        ("API server killed", kill_busiest_api_server),
    ),
    (("engine core killed", kill("engine 0")),),
)
"""Each round has servers of its own; the last fault of each may end them."""


def question(draw: random.Random, *, is_streamed: bool) -> Request:
    """A long answer, in a session of its own."""
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": words(draw, 30, 80)}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    if is_streamed:
        body |= {"stream": True}
    return Request("chat", body, {"X-Session-ID": f"chaos-{draw.getrandbits(48):012x}"})


async def play(
    server: SoakServer, fault: str, act: Act, asked: list[Request], right: list[Answer]
) -> Outcome:
    """One fault while all clients wait for their answers."""
    outcome = Outcome(fault, server.side)
    processes = server.processes()
    async with httpx.AsyncClient(timeout=None) as client:
        coming = [Answer() for _ in asked]
        clients = [
            asyncio.create_task(send(client, server.url, *one))
            for one in zip(asked, coming, strict=True)
        ]
        if act is nothing:
            clients.append(asyncio.create_task(_frozen(server, asked[0])))
            right = [*right, right[0]]
        await _all_begun(asked, coming)
        outcome.under_way = sum(not task.done() for task in clients)
        began = time.monotonic()
        await act(server, processes)
        answers = await asyncio.gather(*clients)
    _tell(outcome, answers, right)
    is_deadly = "killed" in fault
    until = began + (END_WITHIN_S if is_deadly else 1)
    while server.exit_status() is None and time.monotonic() < until:
        await asyncio.sleep(0.1)
    outcome.exit_status = server.exit_status()
    if outcome.exit_status is not None:
        outcome.ended_after_s = time.monotonic() - began
        await asyncio.sleep(2)
        outcome.alive = sum(_is_alive(pid) for pid in processes.values())
    async with httpx.AsyncClient(timeout=None) as client:
        again = await send(client, server.url, asked[1])
    outcome.answers = again.status == 200 and not difference(again, right[1]) and again.is_whole
    return outcome


async def _all_begun(asked: list[Request], coming: list[Answer]) -> None:
    """Until each stream has brought some text; the other clients asked at the same time."""
    streams = [a for r, a in zip(asked, coming, strict=True) if r.body.get("stream")]
    until = time.monotonic() + UNDER_WAY_S
    while not all(any(a.texts.values()) for a in streams) and time.monotonic() < until:
        await asyncio.sleep(0.01)


async def _frozen(server: SoakServer, request: Request) -> Answer:
    """A client that reads a little, then nothing for a while, then the rest."""
    request = Request(request.api, {**request.body, "stream": True}, request.headers)
    url = f"{server.url}/v1/chat/completions"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
    body = json.dumps(request.body).encode()
    head = f"POST {httpx.URL(url).path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    told = await reader.read(2048)
    await asyncio.sleep(FREEZE_S)
    while more := await reader.read(4096):
        told += more
    writer.close()
    answer = Answer(status=int(told.split(maxsplit=2)[1]))
    for line in told.decode(errors="replace").splitlines():
        if line.startswith("data: {"):
            choice = json.loads(line[6:])["choices"][0]
            answer.add(0, choice["delta"].get("content"))
            if choice.get("finish_reason"):
                answer.ends[0] = choice["finish_reason"]
    return answer


def _tell(outcome: Outcome, answers: list[Answer], right: list[Answer]) -> None:
    seen: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for answer, wanted in zip(answers, right, strict=True):
        is_begun = wanted.texts[0].startswith(answer.texts.get(0, ""))
        if answer.stuck:
            seen["stuck"] += 1
        elif answer.status == 200 and answer.is_whole and not answer.problem:
            seen["wrong" if difference(answer, wanted) else "right"] += 1
        elif not is_begun:
            seen["wrong"] += 1
        else:
            seen["error"] += 1
            errors[answer.problem[:120] or f"{answer.status}, broken off"] += 1
    outcome.seen, outcome.errors = dict(seen), dict(errors)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def play_round(
    servers: dict[str, SoakServer], faults: tuple[tuple[str, Act], ...], seed: int
) -> list[Outcome]:
    """Each fault on both servers, one after the other."""
    draw, made = random.Random(seed), []
    for fault, act in faults:
        asked = [question(draw, is_streamed=number % 3 > 0) for number in range(NUM_CLIENTS)]
        async with httpx.AsyncClient(timeout=None) as client:
            right = [
                await send(client, servers[STOCK].url, request.for_stock(MODEL_NAME))
                for request in asked
            ]
        for side in (STOCK, PLUGIN):
            made.append(await play(servers[side], fault, act, asked, right))
            _say(f"{made[-1].row()} {made[-1].errors or ''}")
    return made


def faults_of(outcomes: list[Outcome]) -> list[str]:
    """What the plugin's server did not do as it should; empty: nothing."""
    found = []
    by_side = {(outcome.fault, outcome.side): outcome for outcome in outcomes}
    for (fault, side), outcome in by_side.items():
        if side != PLUGIN:
            continue
        stock = by_side[fault, STOCK]
        for bad in ("wrong", "stuck"):
            if outcome.seen.get(bad, 0) > (stock.seen.get(bad, 0) if bad == "stuck" else 0):
                found.append(f"{fault}: {outcome.seen[bad]} {bad}")
        if (outcome.ended_after_s is None) != (stock.ended_after_s is None):
            found.append(f"{fault}: ends otherwise than stock")
        if outcome.answers != stock.answers:
            found.append(f"{fault}: answers afterwards {outcome.answers}, stock {stock.answers}")
        if outcome.alive > stock.alive:
            found.append(f"{fault}: {outcome.alive} processes left")
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/chaos"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tiny.ensure_tiny()
    outcomes: list[Outcome] = []
    for number, faults in enumerate(ROUNDS):
        with both(OPTIONS, args.out / f"round-{number}") as servers:
            outcomes += asyncio.run(play_round(servers, faults, args.seed + number))
    lines = [
        "| fault | server | answers under way | clients saw | processes | answers afterwards |"
    ]
    lines += ["|---|---|---|---|---|---|", *(outcome.row() for outcome in outcomes)]
    found = faults_of(outcomes)
    rows = {"processes": [asdict(outcome) for outcome in outcomes]}
    try:
        on_disk, more = chaos_disk.play(args.out / "disk", args.seed + len(ROUNDS), _say)
        found += more
        lines += ["", *chaos_disk.HEAD, *(row.row() for row in on_disk)]
        rows["disk"] = [asdict(row) for row in on_disk]
    except PermissionError as error:
        lines += ["", f"A full disk was not played: {error}"]
    lines += ["", *(f"- {fault}" for fault in found)] if found else ["", "Nothing found."]
    print("\n".join(lines))
    (args.out / "report.md").write_text("\n".join(lines) + "\n")
    (args.out / "report.json").write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
