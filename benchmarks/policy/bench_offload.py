# SPDX-License-Identifier: Apache-2.0
"""What comes back from vLLM's CPU offload tier, under its own policies and the plugin's.

    python -m benchmarks.policy.bench_offload [--traces FOLDER]

Recorded agent sessions arrive open-loop and meet vLLM's own ``CPUOffloadingManager``; the GPU
keeps nothing between turns, so every turn asks the tier for its whole prefix. Over-subscription is
the working set divided by what the tier holds. ``ungated`` is the plugin's eviction order without
its admission.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from benchmarks.models import ROOT
from benchmarks.policy.traces import KVCT, Turn, in_order, read_kvct, read_mooncake, working_set
from vllm_stateful.adapters.engine.offload_tier import OffloadTier
from vllm_stateful.adapters.offload_policy import StatefulCachePolicy
from vllm_stateful.schedule.gaps import Wait, WaitKind
from vllm_stateful.schedule.waits import WaitBook
from vllm_stateful.types import Identity, SessionKey

OVERSUBSCRIBED = (1.25, 2.0, 3.7, 8.0)
POLICIES = ("lru", "arc", "ungated", "plugin")
TOKENS_PER_CHUNK = 2048


class Request:
    """The little of vLLM's request that the tier's admission reads and writes."""

    kv_transfer_params: dict[str, Any] | None = None


class Figures(NamedTuple):
    """Chunks of all turns."""

    asked: int
    loaded: int
    stored: int


class Tier:
    """One manager, and what tells it of sessions."""

    def __init__(self, policy: str, num_chunks: int, blocks_per_chunk: int) -> None:
        self.blocks_per_chunk = blocks_per_chunk
        ours = policy in ("ungated", "plugin")
        self.manager = CPUOffloadingManager(
            num_chunks,
            "StatefulCachePolicy" if ours else policy,
            "vllm_stateful.adapters.offload_policy" if ours else None,
        )
        self.is_gated = policy == "plugin"
        self.tier: OffloadTier | None = None
        self.now_s = 0.0
        self.waits = WaitBook()
        self.asked = self.loaded = self.stored = 0
        made = StatefulCachePolicy.take_newest()
        if ours:
            assert made is not None
            made.order._clock = lambda: self.now_s
            self.tier = OffloadTier(made, 1, clock=lambda: self.now_s)

    def arrives(self, turn: Turn, name: str, session: SessionKey) -> ReqContext:
        """Load what is there, store what is not."""
        keys = self.keys_of(turn)
        context = ReqContext(name)
        for place, key in enumerate(keys):
            context.set_offload_key_position(key, place + 1)
        request: Any = Request()
        if self.tier is not None:
            self.waits.came_back(session, self.now_s)
            if self.is_gated:
                self.tier.admit(request, session)
        manager = self.manager
        manager.on_new_request(context)
        hits = itertools.takewhile(
            lambda key: manager.lookup(key, context) is LookupResult.HIT, keys
        )
        num_hits = len(list(hits))
        manager.prepare_load(keys[:num_hits], context)
        manager.complete_load(keys[:num_hits], context)
        self.asked += len(keys)
        self.loaded += num_hits
        if request.kv_transfer_params is None:
            made = manager.prepare_store(keys, context)
            if made is not None:
                manager.complete_store(made.keys_to_store, context)
                self.stored += len(made.keys_to_store)
        return context

    def ends(self, turn: Turn, context: ReqContext, session: SessionKey, number: int) -> None:
        """Its session waits now."""
        if self.tier is not None:
            self.tier.request_ended(context.req_id, session)
            kind = WaitKind.TOOL if turn.calls_tool else WaitKind.USER
            forecast = self.waits.began(session, None, Wait(kind, num_turns=number), self.now_s)
            self.tier.waits(session, forecast, len(self.keys_of(turn)), 0.0)
        self.manager.on_request_finished(context)

    def keys_of(self, turn: Turn) -> list[OffloadKey]:
        """Its full chunks; a key stands for all before it too."""
        space = str(turn.space).encode()
        return [
            make_offload_key(space + int(block).to_bytes(8, "big"), 0)
            for block in turn.blocks[self.blocks_per_chunk - 1 :: self.blocks_per_chunk]
        ]


def play(turns: Sequence[Turn], policy: str, num_chunks: int, blocks_per_chunk: int) -> Figures:
    """All turns through one tier, arrivals and ends in their order in time."""
    tier = Tier(policy, num_chunks, blocks_per_chunk)
    number = itertools.count()
    num_turns: dict[Any, int] = {}
    ends: list[tuple[float, int, Turn, ReqContext, SessionKey, int]] = []

    def end_until(time_s: float) -> None:
        while ends and ends[0][0] <= time_s:
            ended_s, _, *ended = heapq.heappop(ends)
            tier.now_s = ended_s
            tier.ends(*ended)

    for turn in turns:
        end_until(turn.arrived_s)
        tier.now_s = turn.arrived_s
        session = SessionKey(Identity(), str(turn.thread))
        nth = num_turns[turn.thread] = num_turns.get(turn.thread, 0) + 1
        name = next(number)
        context = tier.arrives(turn, str(name), session)
        heapq.heappush(ends, (turn.ended_s, name, turn, context, session, nth))
    return Figures(tier.asked, tier.loaded, tier.stored)


def main(arguments: Sequence[str]) -> int:
    """Play all and print one table per trace."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--seed", type=int, default=0, help="order and arrival of the sessions")
    parser.add_argument("--turns", type=int, default=6000, help="of each trace, from its start")
    args = parser.parse_args(arguments)
    if not (args.traces / KVCT).exists():
        print(f"no traces in {args.traces}", file=sys.stderr)
        return 1
    streams = {
        "Claude Code sessions over 6 h": (read_kvct(args.traces, 6.0, args.seed), 64),
        "Mooncake chat": (read_mooncake(args.traces), 512),
    }
    for title, (turns, tokens_per_block) in streams.items():
        turns = in_order(turns[: args.turns])
        blocks_per_chunk = TOKENS_PER_CHUNK // tokens_per_block
        chunks = working_set(turns) // blocks_per_chunk
        print(f"{title}: {len(turns)} turns, working set {chunks} chunks")
        print("over-subscription  " + "  ".join(f"{name:>22}" for name in POLICIES))
        for ratio in OVERSUBSCRIBED:
            cells = []
            for name in POLICIES:
                found = play(turns, name, int(chunks / ratio), blocks_per_chunk)
                share = found.loaded / found.asked
                cells.append(f"{share:.1%} / {found.stored / found.asked:.1%}".rjust(22))
            print(f"{ratio:17.1f}  " + "  ".join(cells), flush=True)
        print("each cell: share of prompt chunks that came from the tier / that were stored\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
