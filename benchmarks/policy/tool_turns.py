# SPDX-License-Identifier: Apache-2.0
"""How long turns wait that follow a tool call, under retention policies, by a model of time.

    python -m benchmarks.policy.tool_turns [--traces FOLDER] [--out FILE]

The recorded sessions of ``benchmarks.policy`` meet a KV cache on the GPU, and a tier in the host's
memory behind it, each with a policy. A turn's time to its first token is computed, not measured:

    START_S + tokens computed / COMPUTED_PER_S + tokens copied from the tier / COPIED_PER_S

Turns do not wait for each other. Three kinds of servers:

- ``full``: a turn goes on where the longest prefix ends that the cache or the tier has.
- ``states``: a hybrid model with one state for each history, at its end. If any block that an
  earlier turn computed is gone, the state is gone, too, and the whole prompt is computed.
- ``full, tier``: as ``full``, and what the GPU gave up is copied back from the tier. LRU keeps the
  tier where the policy on the GPU is LRU; otherwise the same policy keeps both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.demo import machine
from benchmarks.models import ROOT
from benchmarks.policy.policies import PLUGIN, POLICIES
from benchmarks.policy.prefix_cache import PrefixCache
from benchmarks.policy.traces import KVCT, Turn, read_kvct, working_set

START_S = 0.03
COMPUTED_PER_S = 8_000.0
"""Tokens that are prefilled in a second."""
COPIED_PER_S = 200_000.0
"""Tokens that are copied from the host in a second: 100 KB a token over PCIe 4."""

LRU, *_ = POLICIES
SHOWN = (LRU, "superseded first, then LRU", PLUGIN, "told who returns")
GPU_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)
TIERS = ((0.05, 0.2), (0.05, 0.4), (0.1, 0.4), (0.1, 0.6), (0.2, 0.6), (0.2, 0.8))
"""Shares of the working set: on the GPU, and in the tier."""

Counts = NDArray[np.int64]


class Load:
    """One stream of turns, and what each cache had to compute of it."""

    def __init__(self, turns: Sequence[Turn], tokens_per_block: int) -> None:
        self.turns = turns
        self.tokens_per_block = tokens_per_block
        self.working_set = working_set(turns)
        self.lengths: Counts = np.array([len(turn.blocks) for turn in turns])
        self.new = self._missing(1 << 60, LRU)
        follows: dict[Any, bool] = {}
        kinds = []
        for turn in turns:
            kinds.append(follows.get(turn.thread, False))
            follows[turn.thread] = turn.calls_tool
        self.is_tool_turn = np.array(kinds)
        self._known: dict[tuple[float, str], Counts] = {}

    def missing(self, share: float, policy: str) -> Counts:
        """Blocks of each turn that a cache of a share of the working set does not have."""
        key = (share, policy)
        if key not in self._known:
            self._known[key] = self._missing(int(share * self.working_set), policy)
        return self._known[key]

    def _missing(self, capacity: int, policy: str) -> Counts:
        cache = PrefixCache(capacity, POLICIES[policy]())
        return np.array([cache.begin(turn) for turn in self.turns])

    def seconds(self, kind: str, gpu: float, tier: float, policy: str) -> NDArray[np.float64]:
        """The time to the first token of each turn that follows a tool call."""
        computed = self.missing(gpu, policy)
        copied = np.zeros_like(computed)
        if kind == "states":
            computed = np.where(computed > self.new, self.lengths, computed)
        elif tier:
            left = np.minimum(computed, self.missing(tier, policy))
            copied, computed = computed - left, left
        times = START_S + self.tokens_per_block * (
            computed / COMPUTED_PER_S + copied / COPIED_PER_S
        )
        found: NDArray[np.float64] = times[self.is_tool_turn]
        return found


def rows_of(load: Load) -> list[dict[str, Any]]:
    """All servers: 50th and 90th percentile and mean in seconds, by policy."""
    cases = [("full", share, 0.0) for share in GPU_SHARES]
    cases += [("states", share, 0.0) for share in GPU_SHARES]
    cases += [("full, tier", *shares) for shares in TIERS]
    rows = []
    for kind, gpu, tier in cases:
        by_policy = {}
        for policy in SHOWN:
            times = load.seconds(kind, gpu, tier, policy)
            by_policy[policy] = {
                "p50": round(float(np.percentile(times, 50)), 3),
                "p90": round(float(np.percentile(times, 90)), 3),
                "mean": round(float(times.mean()), 3),
            }
        rows.append({"server": kind, "gpu": gpu, "tier": tier, "seconds": by_policy})
    return rows


def table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """90th percentiles, and how many times LRU's is longer than the plugin's."""
    lines = [title, f"{'server':12} {'GPU':>4} {'tier':>4}" + "".join(f"{n:>28}" for n in SHOWN)]
    lines[-1] += f"{'LRU / plugin, p90':>20}{'mean':>8}"
    for row in rows:
        cells = "".join(
            f"{each['p90']:>18.2f} / {each['mean']:<7.2f}" for each in row["seconds"].values()
        )
        lru, ours = row["seconds"][LRU], row["seconds"][PLUGIN]
        lines.append(
            f"{row['server']:12} {row['gpu']:>4.0%} {row['tier']:>4.0%}{cells}"
            f"{lru['p90'] / ours['p90']:>20.2f}{lru['mean'] / ours['mean']:>8.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Play all, print one table per load."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--seed", type=int, default=0, help="order and arrival of the sessions")
    parser.add_argument("--out", type=Path, help="the results as JSON go here")
    args = parser.parse_args(arguments)
    if not (args.traces / KVCT).exists():
        print(f"no traces in {args.traces}", file=sys.stderr)
        return 1
    loads = {
        f"Claude Code sessions over {hours} h": Load(read_kvct(args.traces, hours, args.seed), 64)
        for hours in (24, 6)
    }
    results = {}
    for title, load in loads.items():
        results[title] = rows_of(load)
        num = int(load.is_tool_turn.sum())
        print(
            table(f"{title}: {num} tool turns, p90 / mean (s)", results[title]) + "\n", flush=True
        )
    if args.out is not None:
        document = machine.describe() | {"seed": args.seed, "loads": results}
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
