# SPDX-License-Identifier: Apache-2.0
"""What a rehearsal found.

python -m benchmarks.gpu.rehearsal.summary RESULTS --bytes N --limit MIB
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from benchmarks.gpu.limited import read_rows


def main() -> int:
    """Print it; 1 where anything is to be mended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path)
    parser.add_argument("--bytes", type=int, required=True, help="of checkout and pack")
    parser.add_argument("--limit", type=int, required=True, help="of an upload, in MiB")
    args = parser.parse_args()
    rows = list(read_rows(args.results))
    findings = {(row["part"], row["what"], row["problem"]) for row in rows if row["problem"]}
    for part, what, problem in sorted(findings):
        print(f"{part}: {what}: {problem}")
    tried = Counter(row["part"] for row in rows if not row["problem"])
    print("went well: " + ", ".join(f"{count} of {part}" for part, count in sorted(tried.items())))
    size = args.bytes / 2**20
    print(f"upload: {size:.1f} of {args.limit} MiB")
    print(f"findings: {len(findings)}")
    return 1 if findings or not rows or size > args.limit else 0


if __name__ == "__main__":
    sys.exit(main())
