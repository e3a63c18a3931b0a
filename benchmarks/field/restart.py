# SPDX-License-Identifier: Apache-2.0
"""What the first turns after a restart cost, with sessions' KV in files, and without.

    python -m benchmarks.field.restart [--sessions 16] [--tokens 6000] [--model FOLDER]
        [--tier-mib 64] [--out FILE]

A server with the plugin answers the first turn of sixteen sessions, and is stopped with SIGTERM
right after the last answer. A new server answers their second turns, one at a time, in another
order. Three restarts are measured: the plugin with the files, stock vLLM with the same files in its
own file tier (without API keys the hashes are the same), and the plugin after all files were
removed. All answers must be equal. vLLM's worker for the tier needs a GPU, so on a CPU one of ours
copies (`benchmarks.reliability.host_tier`). The model is the tiny one of two layers, in float32: a
cold turn costs it least, so a larger one gains more.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.demo.machine import ROOT, describe
from benchmarks.models.tiny import ensure_tiny
from benchmarks.ports import HOST
from benchmarks.reliability.chaos_disk import SHARED_MEMORY
from benchmarks.serving.client import ChatClient, Reply, encode_body
from benchmarks.serving.servers import PLUGIN, STOCK, Server, Settings
from benchmarks.serving.tables import markdown, percentile, ratio

MODEL_NAME = "tiny"
ANSWER_TOKENS = 16
TIER_MIB = 64
"""Of the tier's memory: less than all sessions need, and more than one."""
SETTLE_S = 2.0
"""A CPU worker spins for one second after each request."""
RESULTS = ROOT / "benchmarks" / "field" / "results" / "restart.json"
WORDS = ("river", "stone", "paper", "window", "garden", "engine", "letter", "market", "silver")

RESTORED, OWN, COLD = "plugin", "stock", "plugin, files removed"
RESTARTS = {RESTORED: PLUGIN, OWN: STOCK, COLD: PLUGIN}

Message = dict[str, str]


@dataclass
class Turn:
    """The first turn of one session on a new server.

    Attributes:
        first_ms: from sending the request to the first event of the answer.
    """

    restart: str
    session: int
    prompt_tokens: int
    cached_tokens: int
    first_ms: float
    text: str

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


@dataclass
class Stop:
    """How the first server ended, and what it left.

    Attributes:
        seconds: from SIGTERM to the end of all its processes.
        parts: files that were begun and never ended.
    """

    seconds: float
    files: int
    mib: float
    parts: int


def settings(side: str, files: Path, tier_mib: int) -> Settings:
    """Of a server with a tier in memory, and files behind it."""
    tier: dict[str, str] = {"type": "fs", "root_dir": str(files)}
    extra: dict[str, Any] = {
        "cpu_bytes_to_use": tier_mib << 20,
        "offload_prompt_only": False,
        "spec_name": "HostTieringSpec",
        "spec_module_path": "benchmarks.reliability.host_tier",
    }
    if side == PLUGIN:
        tier |= {"type": "SessionFiles", "module_path": "vllm_stateful.adapters.session_files"}
        extra["eviction_policy"] = "StatefulCachePolicy"
        extra["cache_policy_module_path"] = "vllm_stateful.adapters.offload_policy"
    connector: dict[str, Any] = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    connector["kv_connector_extra_config"] = extra | {"secondary_tiers": [tier]}
    return Settings(
        model_name=MODEL_NAME,
        max_model_len=8192,
        arguments=(
            *("--block-size", "32", "--max-num-batched-tokens", "2048"),
            *("--shutdown-timeout", "60", "--kv-transfer-config", json.dumps(connector)),
        ),
        kv_gib=1,
        environment={
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        },
    )


@dataclass(frozen=True)
class Place:
    """What all servers have in common.

    Attributes:
        tier_mib: of the tier's memory.
    """

    model: Path
    logs: Path
    tier_mib: int


class Sessions:
    """What the clients say. The same for every server."""

    def __init__(self, num: int, num_tokens: int) -> None:
        draw = random.Random(0)
        self.histories: list[list[Message]] = []
        for number in range(num):
            words = (draw.choice(WORDS) for _ in range(num_tokens))
            rules = f"Session {number}. " + " ".join(words)
            question = {"role": "user", "content": "What stands by the river?"}
            self.histories.append([{"role": "system", "content": rules}, question])
        self.order = draw.sample(range(num), num)

    def body(self, session: int, *, is_second: bool) -> bytes:
        """Of a request. What is kept as the answer of the first turn is the same everywhere."""
        said = list(self.histories[session])
        if is_second:
            said.append({"role": "assistant", "content": "A stone, and a letter from the market."})
            said.append({"role": "user", "content": f"And by window {session}?"})
        return encode_body(MODEL_NAME, said, ANSWER_TOKENS, ignore_eos=True)


@contextmanager
def started(side: str, name: str, place: Place, files: Path) -> Iterator[Server]:
    """A server that answers. At the end it gets SIGTERM, as stop_group sends it."""
    logs = place.logs / name
    logs.mkdir(parents=True, exist_ok=True)
    regions = set(SHARED_MEMORY.glob("vllm_offload_*"))
    options = settings(side, files, place.tier_mib)
    made = Server(side, place.model, logs, is_timed=False, settings=options)
    with made as server:
        server.wait_until_ready()
        time.sleep(SETTLE_S)
        yield server
    for left in set(SHARED_MEMORY.glob("vllm_offload_*")) - regions:
        left.unlink(missing_ok=True)


def ask(client: ChatClient, body: bytes) -> Reply:
    """One turn, on a server that rests."""
    reply = client.ask(body)
    time.sleep(SETTLE_S)
    return reply


def fill(sessions: Sessions, place: Place, files: Path) -> Stop:
    """The first turn of each session, and the end of the server right behind the last answer."""
    with started(PLUGIN, "first", place, files) as server:
        with ChatClient(HOST, server.port) as client:
            for number in range(len(sessions.histories)):
                client.ask(sessions.body(number, is_second=False))
        stopped = time.monotonic()
    found = [path for path in files.rglob("*") if path.is_file()]
    blocks = [path for path in found if path.suffix == ".bin"]
    return Stop(
        time.monotonic() - stopped,
        len(blocks),
        sum(path.stat().st_size for path in blocks) / 2**20,
        sum(path.suffix == ".tmp" for path in found),
    )


def second_turns(
    restart: str, side: str, sessions: Sessions, place: Place, files: Path
) -> list[Turn]:
    """The first turns on a new server."""
    turns = []
    name = restart.replace(", ", "-").replace(" ", "-")
    with started(side, name, place, files) as server, ChatClient(HOST, server.port) as to:
        for session in sessions.order:
            reply = ask(to, sessions.body(session, is_second=True))
            first_ms = (reply.first_s - reply.sent_s) * 1000
            counts = (reply.num_prompt_tokens, reply.num_cached_tokens)
            turns.append(Turn(restart, session, *counts, first_ms, reply.text))
    return turns


def measure(sessions: Sessions, place: Place, files: Path) -> tuple[list[Turn], Stop]:
    """All restarts. Each begins with the files that the first server left."""
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir(parents=True)
    stop = fill(sessions, place, files)
    _say(json.dumps(asdict(stop)))
    (folder,) = files.iterdir()
    left = set(files.rglob("*.bin"))
    turns: list[Turn] = []
    for restart, side in RESTARTS.items():
        for path in set(files.rglob("*.bin")) - (set() if restart == COLD else left):
            path.unlink()
        where = folder if side == STOCK else files
        made = second_turns(restart, side, sessions, place, where)
        _say(f"{restart}: {percentile([turn.first_ms for turn in made], 0.5):,.0f} ms")
        turns += made
    shutil.rmtree(files)
    return turns, stop


def unequal(turns: Sequence[Turn]) -> list[int]:
    """The sessions that were not answered the same after all restarts."""
    texts: dict[int, set[str]] = {}
    for turn in turns:
        texts.setdefault(turn.session, set()).add(turn.text)
    return sorted(session for session, said in texts.items() if len(said) > 1)


def summary(turns: Sequence[Turn]) -> dict[str, dict[str, float]]:
    """By restart: medians, and the worst first token."""
    found = {}
    for restart in dict.fromkeys(turn.restart for turn in turns):
        of = [turn for turn in turns if turn.restart == restart]
        first = [turn.first_ms for turn in of]
        found[restart] = {
            "first_ms_p50": round(percentile(first, 0.5), 1),
            "first_ms_max": round(max(first), 1),
            "prompt_tokens_p50": percentile([turn.prompt_tokens for turn in of], 0.5),
            "computed_tokens_p50": percentile([turn.computed_tokens for turn in of], 0.5),
        }
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """The summary as a table of Markdown."""
    head = ["restart", "first token ms, p50", "max", "cold / it", "prompt tokens", "computed"]
    cold = found[COLD]["first_ms_p50"]
    rows = [
        [
            restart,
            f"{each['first_ms_p50']:,.0f}",
            f"{each['first_ms_max']:,.0f}",
            ratio(cold, each["first_ms_p50"]),
            f"{each['prompt_tokens_p50']:,.0f}",
            f"{each['computed_tokens_p50']:,.0f}",
        ]
        for restart, each in found.items()
    ]
    return markdown(head, rows)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Measure, print, write the file; 1 when answers differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=6000, help="words in a session's rules")
    parser.add_argument("--model", type=Path, help="a folder; default: the tiny model")
    parser.add_argument("--tier-mib", type=int, default=TIER_MIB, help="memory of the tier")
    parser.add_argument("--files", type=Path, default=ROOT / "out" / "restart" / "files")
    parser.add_argument("--logs", type=Path, default=ROOT / "out" / "restart")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    place = Place(args.model or ensure_tiny(), args.logs, args.tier_mib)
    turns, stop = measure(Sessions(args.sessions, args.tokens), place, args.files)
    found, different = summary(turns), unequal(turns)
    print(table(found))
    print(f"sessions with different answers: {different or 'none'}")
    command = shlex.join(["python", "-m", "benchmarks.field.restart", *sys.argv[1:]])
    setup = {
        "model": place.model.name,
        "sessions": args.sessions,
        "words": args.tokens,
        "tier_mib": args.tier_mib,
    }
    samples = [{**asdict(turn), "first_ms": round(turn.first_ms, 1)} for turn in turns]
    made = {
        **describe(),
        "command": command,
        "setup": setup,
        "restarts": found,
        "sessions_with_different_answers": different,
        "stop": {key: round(value, 1) for key, value in asdict(stop).items()},
        "turns": [{k: v for k, v in sample.items() if k != "text"} for sample in samples],
    }
    args.out.write_text(json.dumps(made, indent=1) + "\n")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
