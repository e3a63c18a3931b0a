# SPDX-License-Identifier: Apache-2.0
"""Chaos: the disk fills up where vLLM's offload tier writes, and has room again.

Conversations that fit neither into the KV cache nor into the tier's memory, so that turns need what
was written to files. The file system is a small one of its own, and a file of ours takes the rest
of it: first all but some blocks and a half, so that writes are cut, then all. Every server has the
tier. What is right is asked from stock vLLM without cache and tier before.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.models import tiny
from benchmarks.reliability.soak_client import Answer, Request, difference, send
from benchmarks.reliability.soak_servers import NUM_BLOCKS, Options, SoakServer, settings
from benchmarks.reliability.soak_sessions import words
from benchmarks.serving.servers import MODEL_NAME, PLUGIN, STOCK, Settings

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
OPTIONS = Options(has_drafts=False, response_cache="0")
NUM_SESSIONS, NUM_AT_ONCE = 18, 6
MAX_TOKENS = 16
DISK_MIB = 64
BLOCK_BYTES = 32 << 10
TIER_BYTES = 128 * BLOCK_BYTES
SOME_BLOCKS = 5 * BLOCK_BYTES + BLOCK_BYTES // 2

FAILED = "vllm:kv_offload_tiering_cascade_job_failures_total"
READ = "vllm:kv_offload_tiering_read_bytes_total"
WRITTEN = "vllm:kv_offload_tiering_write_bytes_total"


@dataclass(frozen=True)
class Variant:
    """A server, and who says what leaves the tier's memory."""

    name: str
    side: str
    knows_sessions: bool = False


VARIANTS = (
    Variant("stock", STOCK),
    Variant("plugin", PLUGIN),
    Variant("plugin, its policy", PLUGIN, knows_sessions=True),
)


@dataclass
class Row:
    """One turn of all sessions on one server.

    Attributes:
        seen: what the clients saw: right, error, wrong, stuck.
        errors: of those, by text.
        failed_writes: of the tier's jobs.
        read_kib, written_kib: between the tier's memory and the files.
    """

    part: str
    variant: str
    seen: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    is_running: bool = True
    failed_writes: int = 0
    written_kib: int = 0
    read_kib: int = 0

    def row(self) -> str:
        """Of the table."""
        seen = ", ".join(f"{number} {name}" for name, number in sorted(self.seen.items()))
        goes_on = "goes on" if self.is_running else "ended"
        files = f"{self.failed_writes} | {self.written_kib} | {self.read_kib}"
        return f"| {self.part} | {self.variant} | {seen} | {goes_on} | {files} |"


HEAD = (
    "| disk | server | clients saw | processes | writes that failed | KiB written | KiB read |",
    "|---|---|---|---|---|---|---|",
)


class Disk:
    """A small file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, room: int) -> None:
        """Take all of it but so many bytes."""
        with self._filler.open("ab", buffering=0) as file:
            with suppress(OSError):
                while file.write(bytes(1 << 20)):
                    pass
            file.truncate(max(0, file.tell() - room))

    def free(self) -> None:
        """Give it back."""
        self._filler.unlink(missing_ok=True)

    def cut_blocks(self) -> list[str]:
        """Files that would be read, and are not whole."""
        found = self.folder.rglob("*.bin")
        return [path.name for path in found if path.stat().st_size != BLOCK_BYTES]


@contextmanager
def mounted(folder: Path) -> Iterator[Disk]:
    """A new file system; needs the right to mount one.

    Raises:
        PermissionError: there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    regions = set(SHARED_MEMORY.glob("vllm_offload_*"))
    try:
        yield Disk(folder.resolve())
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)
        for left in set(SHARED_MEMORY.glob("vllm_offload_*")) - regions:
            left.unlink(missing_ok=True)  # vLLM leaves the tier's memory there when it is stopped


def transfer_config(folder: Path, num_bytes: int, *, knows_sessions: bool) -> str:
    """Of ``--kv-transfer-config``: so much memory, and files behind it.

    Args:
        knows_sessions: whether the plugin's policy says what leaves the memory.
    """
    extra: dict[str, Any] = {
        "cpu_bytes_to_use": num_bytes,
        "spec_name": "HostTieringSpec",
        "spec_module_path": "benchmarks.reliability.host_tier",
        "secondary_tiers": [{"type": "fs", "root_dir": str(folder)}],
    }
    if knows_sessions:
        extra["eviction_policy"] = "StatefulCachePolicy"
        extra["cache_policy_module_path"] = "vllm_stateful.adapters.offload_policy"
    made = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    return json.dumps({**made, "kv_connector_extra_config": extra})


def tier_settings(variant: Variant, disk: Disk) -> Settings:
    """Of a server with the tier; stock vLLM has a cache of the same size, too."""
    made = settings(OPTIONS, {})
    tier = transfer_config(disk.folder, TIER_BYTES, knows_sessions=variant.knows_sessions)
    stock = ("--num-gpu-blocks-override", str(NUM_BLOCKS))
    stock += ("--api-server-count", str(OPTIONS.api_servers))
    arguments = stock if variant.side == STOCK else made.side_arguments[PLUGIN]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return dataclasses.replace(
        made,
        environment={**made.environment, "PYTHONPATH": os.pathsep.join(paths)},
        side_arguments={variant.side: (*arguments, "--kv-transfer-config", tier)},
    )


Turn = list[tuple[Request, Answer]]


async def conversations(url: str, num_turns: int, seed: int) -> list[Turn]:
    """What is asked in each turn, and what is right."""
    draw = random.Random(seed)
    histories: list[list[dict[str, str]]] = [[] for _ in range(NUM_SESSIONS)]
    turns = []
    async with httpx.AsyncClient(timeout=None) as client:
        for _ in range(num_turns):
            turn = []
            for number, history in enumerate(histories):
                history.append({"role": "user", "content": words(draw, 60, 110)})
                body = {
                    "model": MODEL_NAME,
                    "messages": list(history),
                    "max_tokens": MAX_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                asked = Request("chat", body, {"X-Session-ID": f"chaos-disk-{number:04d}"})
                right = await send(client, url, asked.for_stock(MODEL_NAME))
                assert right.is_whole, right.problem
                history.append({"role": "assistant", "content": right.texts[0]})
                turn.append((asked, right))
            turns.append(turn)
    return turns


async def play_turn(server: SoakServer, row: Row, turn: Turn) -> Row:
    """All sessions once, some at a time."""
    before = _figures(server)
    places = asyncio.Semaphore(NUM_AT_ONCE)
    seen: Counter[str] = Counter()
    errors: Counter[str] = Counter()

    async def ask(client: httpx.AsyncClient, asked: Request, right: Answer) -> None:
        async with places:
            answer = await send(client, server.url, asked)
        if answer.stuck:
            seen["stuck"] += 1
        elif answer.status == 200 and answer.is_whole and not answer.problem:
            seen["wrong" if difference(answer, right) else "right"] += 1
        else:
            seen["error"] += 1
            errors[answer.problem[:120] or str(answer.status)] += 1

    async with httpx.AsyncClient(timeout=None) as client:
        await asyncio.gather(*(ask(client, *one) for one in turn))
    await asyncio.sleep(2)  # the last writes, and the next count
    row.seen, row.errors = dict(seen), dict(errors)
    row.is_running = server.exit_status() is None
    if row.is_running:
        after = _figures(server)
        row.failed_writes = after[FAILED] - before[FAILED]
        row.written_kib = (after[WRITTEN] - before[WRITTEN]) >> 10
        row.read_kib = (after[READ] - before[READ]) >> 10
    return row


def _figures(server: SoakServer) -> Counter[str]:
    found: Counter[str] = Counter()
    with suppress(httpx.TransportError):
        for name, value in server.metrics().items():
            found[name.partition("{")[0]] += int(value)
    return found


PARTS: tuple[tuple[str, Callable[[Disk], None] | None], ...] = (
    ("has room", None),
    ("has room", None),
    ("has room for 5.5 blocks", partial(Disk.fill, room=SOME_BLOCKS)),
    ("is full", partial(Disk.fill, room=0)),
    ("is full", None),
    ("has room again", Disk.free),
    ("has room again", None),
)


def play(folder: Path, seed: int, say: Callable[[str], None]) -> tuple[list[Row], list[str]]:
    """All turns on all servers, one server at a time: the rows, and what is wrong.

    Raises:
        PermissionError: no file system can be mounted.
    """
    right = folder / "right"
    right.mkdir(parents=True, exist_ok=True)
    plain = SoakServer(STOCK, tiny.DEFAULT, right, is_timed=False, settings=settings(OPTIONS, {}))
    with mounted(folder / "disk"), plain:  # mounted to see whether that may be done
        plain.wait_until_ready()
        turns = asyncio.run(conversations(plain.url, len(PARTS), seed))
    rows: list[Row] = []
    found: list[str] = []
    for variant in VARIANTS:
        logs = folder / variant.name.replace(", ", "-").replace(" ", "-")
        logs.mkdir(exist_ok=True)
        with mounted(folder / "disk") as disk:
            made = tier_settings(variant, disk)
            server = SoakServer(variant.side, tiny.DEFAULT, logs, is_timed=False, settings=made)
            with server:
                server.wait_until_ready()
                for (part, act), turn in zip(PARTS, turns, strict=True):
                    if act is not None:
                        act(disk)
                    rows.append(asyncio.run(play_turn(server, Row(part, variant.name), turn)))
                    say(f"{rows[-1].row()} {rows[-1].errors or ''}")
                if cut := disk.cut_blocks():
                    found.append(f"disk, {variant.name}: {len(cut)} blocks that are not whole")
    return rows, found + faults_of(rows)


def faults_of(rows: list[Row]) -> list[str]:
    """What a server did not do as it should, or the play did not show."""
    found = []
    by_variant = {v.name: [row for row in rows if row.variant == v.name] for v in VARIANTS}
    for name, played in by_variant.items():
        if not any(row.failed_writes for row in played if "again" not in row.part):
            found.append(f"disk, {name}: no write failed")
        if not any(row.read_kib for row in played):
            found.append(f"disk, {name}: nothing was read from it")
        for row, stock in zip(played, by_variant[VARIANTS[0].name], strict=True):
            if row.seen.get("wrong"):
                found.append(f"disk {row.part}, {name}: {row.seen['wrong']} wrong")
            for bad in ("stuck", "error"):
                if row.seen.get(bad, 0) > stock.seen.get(bad, 0):
                    found.append(f"disk {row.part}, {name}: {row.seen[bad]} {bad}")
            if row.is_running != stock.is_running:
                found.append(f"disk {row.part}, {name}: runs: {row.is_running}, not stock's")
            if "room" in row.part and "blocks" not in row.part and row.failed_writes:
                found.append(f"disk {row.part}, {name}: {row.failed_writes} writes failed")
    return found
