# SPDX-License-Identifier: Apache-2.0
"""Prefill of recorded agent sessions under retention policies, at several cache sizes.

    python -m benchmarks.policy [--traces FOLDER]

Sessions arrive open-loop; a turn arrives when its log says so after the end of the one before, no
matter what it had to compute. Prefill amplification is what was computed divided by what was new:
1.0 is a cache that forgets nothing.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.demo import machine
from benchmarks.models import ROOT
from benchmarks.policy.plot import save_plot
from benchmarks.policy.policies import PLUGIN, POLICIES
from benchmarks.policy.prefix_cache import PrefixCache
from benchmarks.policy.traces import KVCT, Turn, read_kvct, read_mooncake, working_set

SHARES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
HOURS = (24.0, 6.0)
LRU, BELADY = next(iter(POLICIES)), list(POLICIES)[-1]

Row = dict[str, float]
"""Prefill amplification by policy, at one cache size, and how often running turns overfilled it."""


def measure(turns: Sequence[Turn], share: float) -> Row:
    """All policies on a cache of this share of the working set."""
    capacity = int(share * working_set(turns))
    new = PrefixCache(1 << 60, POLICIES[LRU]())
    new.play(turns)
    row: Row = {}
    for name, make in POLICIES.items():
        cache = PrefixCache(capacity, make())
        cache.play(turns)
        row[name] = cache.num_computed / new.num_computed
        row["overfull"] = cache.num_overfull / len(turns)
    return row


def closed(row: Row, name: str) -> float:
    """The part of the gap between LRU and Belady that a policy closes."""
    gap = row[LRU] - row[BELADY]
    return (row[LRU] - row[name]) / gap if gap else 0.0


def table(title: str, rows: dict[float, Row]) -> str:
    """One line per cache size."""
    names = list(POLICIES)
    lines = [
        title,
        "  ".join(["share of working set", *names, "gap closed", "turns that overfill"]),
    ]
    for share, row in rows.items():
        cells = [f"{share:.0%}".rjust(20)]
        cells += [f"{row[name]:.3f}".rjust(len(name)) for name in names]
        cells += [f"{closed(row, PLUGIN):.0%}".rjust(10), f"{row['overfull']:.1%}".rjust(19)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Play all, print the tables, write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "policy" / "results")
    parser.add_argument("--seed", type=int, default=0, help="order and arrival of the sessions")
    args = parser.parse_args(arguments)
    if not (args.traces / KVCT).exists():
        print(f"no traces in {args.traces}", file=sys.stderr)
        return 1
    start = time.monotonic()
    streams = {
        f"Claude Code sessions over {hours:.0f} h": read_kvct(args.traces, hours, args.seed)
        for hours in HOURS
    }
    streams["Mooncake chat"] = read_mooncake(args.traces)
    results = {}
    for title, turns in streams.items():
        results[title] = {share: measure(turns, share) for share in SHARES}
        print(table(f"{title}: {len(turns)} turns, {working_set(turns)} blocks", results[title]))
        print(flush=True)
    print(f"{time.monotonic() - start:.0f} s")
    args.out.mkdir(parents=True, exist_ok=True)
    about = machine.describe() | {"seed": args.seed}
    (args.out / "policy.json").write_text(json.dumps({"about": about, "rows": results}, indent=1))
    save_plot(args.out / "policy.png", results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
