# SPDX-License-Identifier: Apache-2.0
"""Who plays the soak: workers with sessions, one who disturbs, and who compares with stock."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.reliability.soak_client import (
    DEADLINE_S,
    Answer,
    Request,
    difference,
    is_near_tie,
    send,
)
from benchmarks.reliability.soak_servers import ADAPTERS, SWAP, Options, SoakServer, adapter_path
from benchmarks.reliability.soak_sessions import (
    MOST_CHARS,
    Session,
    make_request,
    new_session,
    say_something,
)
from benchmarks.serving.servers import PLUGIN, STOCK

NUM_WORKERS = 12
SHARE_COMPARED = 0.2
SHARE_NAMED = 0.85
NAMED_ONLY_FROM = 0.7
"""Of the time. Sessions without a name cannot be closed, so none may be left at the end."""

CALM_FROM = 0.85
"""Of the time. Behind it nothing is reset, so that there is something to close at the end."""

SETTLE_S = 1.0
"""The engine still computes for a client that has just left; as in stock vLLM, what it computes
while the adapter changes is kept under the name of the old one."""


class Gate:
    """Many may be inside, or one alone."""

    def __init__(self) -> None:
        self._inside = 0
        self._changed = asyncio.Condition()
        self._alone = asyncio.Lock()

    @asynccontextmanager
    async def inside(self) -> AsyncIterator[None]:
        async with self._alone:
            self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            async with self._changed:
                self._changed.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._alone:
            async with self._changed:
                await self._changed.wait_for(lambda: self._inside == 0)
            yield


@dataclass
class Tally:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    stuck: list[dict[str, Any]] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


class Soak:
    """The load of one run.

    Args:
        servers: by side.
        seconds: how long it is played.
        folder: holds the adapters; wrong answers and stuck requests are written there.
    """

    def __init__(
        self,
        servers: dict[str, SoakServer],
        options: Options,
        *,
        seconds: float,
        seed: int,
        folder: Path,
    ) -> None:
        self.tally = Tally()
        self._servers, self._options = servers, options
        self._url, self._stock_url = servers[PLUGIN].url, servers[STOCK].url
        self._seconds, self._seed, self._folder = seconds, seed, folder
        self._gate = Gate()
        self._stock_turn = asyncio.Lock()
        self._adapter = ADAPTERS[0]
        self._num_aborts = 0
        """Begins and ends of pauses that abort: odd while one is under way."""
        self.sessions: dict[tuple[str, str, str | None], None] = {}
        """Names, API keys and salts of all that may hold something."""

    async def play(self) -> None:
        """All of it; ends when the last request has."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        async with httpx.AsyncClient(timeout=None, limits=limits) as self._client:
            self._began = time.monotonic()
            await self._swap()
            async with asyncio.TaskGroup() as group:
                for number in range(NUM_WORKERS):
                    group.create_task(self._work(number))
                group.create_task(self._disturb())
                group.create_task(self._forget_unnamed())
            await self._post("resume", "/resume")

    async def close_sessions(self) -> None:
        """Close each, as a client does."""
        async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
            for session in self.sessions:
                await self._close(client, "close", session)

    async def _close(
        self, client: httpx.AsyncClient, name: str, session: tuple[str, str, str | None]
    ) -> None:
        """404 is right as well: nothing was kept."""
        session_id, key, salt = session
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        params = {"cache_salt": salt} if salt else {}
        url = f"{self._url}/v1/sessions/{session_id}"
        try:
            reply = await client.delete(url, headers=headers, params=params, timeout=DEADLINE_S)
        except httpx.HTTPError as error:
            self.tally.problems[f"{name}: {error!r}"] += 1
            return
        self.tally.counts[f"{name} {reply.status_code}"] += 1
        if reply.status_code not in (200, 404):
            self.tally.problems[f"{name} {reply.status_code}: {reply.text[:200]}"] += 1

    def _share_gone(self) -> float:
        """Of the time; 1 where the server has ended."""
        if self._servers[PLUGIN].exit_status() is not None:
            return 1.0
        return (time.monotonic() - self._began) / self._seconds

    async def _work(self, number: int) -> None:
        draw = random.Random(f"{self._seed} worker {number}")
        played = 0
        while self._share_gone() < 1:
            named = draw.random() < SHARE_NAMED or self._share_gone() >= NAMED_ONLY_FROM
            session = new_session(draw, f"{number}-{played}", self._options, is_named=named)
            await self._play_session(draw, session, draw.randint(1, 6))
            played += 1

    async def _play_session(self, draw: random.Random, session: Session, turns: int) -> None:
        for _ in range(turns):
            if self._share_gone() >= 1 or session.num_chars() > MOST_CHARS:
                return
            if session.id is None and self._share_gone() >= NAMED_ONLY_FROM:
                return
            say_something(draw, session)
            request = make_request(draw, session)
            answer = await self._turn(draw, session, request)
            if draw.random() < 0.1:
                await self._again(draw, session, request)
            session.hear(answer, draw.randrange(request.body.get("n", 1)))
            if draw.random() < 0.1:
                new = f"{session.id}-f{draw.getrandbits(16):04x}" if session.id else None
                child = session.fork(new)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._play_session(draw, child, draw.randint(1, 2)))
                    group.create_task(self._play_session(draw, session, 1))
                self.tally.counts["forks"] += 1
            if draw.random() < 0.3:  # a tool runs
                await asyncio.sleep(draw.uniform(0, 0.5))

    async def _again(self, draw: random.Random, session: Session, request: Request) -> None:
        """The same request twice more, at once: from memory, or as one in flight."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._turn(draw, session, request))
            group.create_task(self._turn(draw, session, request))

    async def _turn(self, draw: random.Random, session: Session, request: Request) -> Answer:
        if session.id:
            self.sessions[session.id, session.key, session.salt] = None
        is_compared = request.body["temperature"] == 0 and draw.random() < SHARE_COMPARED
        async with self._gate.inside():
            adapter, aborts, begin = self._adapter, self._num_aborts, time.monotonic()
            answer = await send(self._client, self._url, request)
            self.tally.seconds.append(time.monotonic() - begin)
            self._count(request, answer)
        is_right_to_end = answer.is_whole or answer.is_cut
        is_aborting = aborts % 2 == 1 or aborts != self._num_aborts
        if is_aborting and request.api in ("messages", "responses"):
            is_right_to_end = False  # these do not tell an abort from an end
        if is_compared and answer.status == 200 and not answer.problem and is_right_to_end:
            model = adapter if session.model == SWAP else session.model
            await self._compare(request, answer, model)
        return answer

    def _count(self, request: Request, answer: Answer) -> None:
        counts = self.tally.counts
        manner = "streamed" if request.body.get("stream") else "whole"
        if request.breaks_after is not None:
            manner = "left"
        elif request.pause_s:
            manner = "slow"
        counts["requests"] += 1
        counts[f"{request.api}, {manner}"] += 1
        if request.body.get("n"):
            counts["n=2"] += 1
        if request.body["model"] in (*ADAPTERS, SWAP):
            counts["with an adapter"] += 1
        if answer.stuck:
            self.tally.stuck.append(asdict(request))
            self._write("stuck.jsonl", asdict(request))
        elif answer.problem or answer.status != 200:
            self.tally.problems[f"{request.api} {answer.status}: {answer.problem[:200]}"] += 1
        elif not answer.is_cut and not answer.is_whole:
            counts["aborted by a pause"] += 1

    async def _compare(self, request: Request, found: Answer, model: str) -> None:
        asked = request.for_stock(model)
        async with self._stock_turn:
            wanted = await send(self._client, self._stock_url, asked)
            if wanted.status != 200 or wanted.stuck or wanted.problem:
                self.tally.problems[f"stock {wanted.status}: {wanted.problem[:200]}"] += 1
                return
            self.tally.counts["compared"] += 1
            has_text = request.body.get("tool_choice") != "required"
            what = difference(found, wanted, has_text=has_text)
            if not what:
                return
            if await is_near_tie(self._client, self._stock_url, asked, found, wanted):
                self.tally.counts["near ties"] += 1
                return
        row = {"what": what, "request": asdict(request), "model": model}
        row |= {"found": asdict(found), "stock": asdict(wanted)}
        row["at_s"] = round(time.monotonic() - self._began, 1)
        self.tally.wrong.append(row)
        self._write("wrong.jsonl", row)

    async def _disturb(self) -> None:
        """Resets, pauses and adapters, at odd times."""
        draw = random.Random(f"{self._seed} disturber")
        acts = [
            self._reset,
            self._reset,
            self._reset_running,
            partial(self._pause, draw),
            partial(self._close_one, draw),
            *([self._swap] * 3 if self._options.swaps else []),
        ]
        while self._share_gone() < CALM_FROM:
            await asyncio.sleep(min(draw.uniform(1, 6), self._seconds * 0.1))
            await draw.choice(acts)()

    async def _reset(self) -> None:
        await self._post("reset_prefix_cache", "/reset_prefix_cache")

    async def _reset_running(self) -> None:
        path = "/reset_prefix_cache?reset_running_requests=true"
        await self._post("reset_prefix_cache with requests", path)

    async def _pause(self, draw: random.Random) -> None:
        mode = draw.choice(("keep", "keep", "wait", "abort"))
        clears = draw.choice(("true", "false"))
        self._num_aborts += mode == "abort"
        await self._post(f"pause {mode}", f"/pause?mode={mode}&clear_cache={clears}")
        await asyncio.sleep(draw.uniform(0, 1.5))
        await self._post("resume", "/resume")
        self._num_aborts += mode == "abort"

    async def _close_one(self, draw: random.Random) -> None:
        """A session that may be in the middle of a turn."""
        if self.sessions:
            session = draw.choice(list(self.sessions)[-20:])
            await self._close(self._client, "close early", session)

    async def _swap(self) -> None:
        """Another adapter under the same name, when nobody asks for it."""
        if not self._options.swaps:
            return
        async with self._gate.alone():
            await asyncio.sleep(SETTLE_S)
            self._adapter = ADAPTERS[self._adapter == ADAPTERS[0]]
            path = adapter_path(self._folder, self._adapter)
            body = {"lora_name": SWAP, "lora_path": path, "load_inplace": True}
            await self._post("adapter swapped", "/v1/load_lora_adapter", body)

    async def _forget_unnamed(self) -> None:
        """At a moment without requests; behind it all sessions have names."""
        await asyncio.sleep(self._seconds * NAMED_ONLY_FROM + 1)
        async with self._gate.alone():
            for _ in range(20):
                if await self._post("reset at rest", "/reset_prefix_cache"):
                    return
                await asyncio.sleep(0.5)
        self.tally.problems["the cache was not reset at rest"] += 1

    async def _post(self, name: str, path: str, body: dict[str, Any] | None = None) -> bool:
        """Whether it was done, and says so."""
        try:
            reply = await self._client.post(self._url + path, json=body, timeout=DEADLINE_S)
        except httpx.HTTPError as error:
            self.tally.problems[f"{name}: {error!r}"] += 1
            return False
        self.tally.counts[name] += 1
        if reply.status_code != 200:
            self.tally.problems[f"{name} {reply.status_code}: {reply.text[:200]}"] += 1
        return reply.status_code == 200 and '"success":false' not in reply.text

    def _write(self, name: str, row: dict[str, Any]) -> None:
        with (self._folder / name).open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
