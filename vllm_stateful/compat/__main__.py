# SPDX-License-Identifier: Apache-2.0
"""Show what is patched and used of vLLM, and check whether a vLLM fits.

python -m vllm_stateful.compat                      the patches, and the installed vLLM
python -m vllm_stateful.compat check WHERE [--all]  a folder with the package vllm, a wheel, or a
                                                    version whose wheel pip downloads
python -m vllm_stateful.compat record FOLDER        the shapes of a folder, as JSON
"""

import argparse
import json
import sys
from pathlib import Path

from vllm_stateful.compat import ledger, release, shapes, uses
from vllm_stateful.compat.patch import CompatError


def main() -> int:
    """Print what is asked for. Returns 1 if something does not fit, 2 if it cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_stateful.compat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print what patches/README.md holds"
    )
    commands = parser.add_subparsers(dest="command")
    check = commands.add_parser("check", help="compare a vLLM that is not installed")
    check.add_argument("where", help="folder, wheel, or version that pip downloads")
    check.add_argument("--all", action="store_true", help="also list what fits")
    record = commands.add_parser("record", help="the shapes of what is used")
    record.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.markdown:
        sys.stdout.write(ledger.render_markdown())
        return 0
    if options.command == "record":
        found = uses.record(shapes.Source(options.folder))
        sys.stdout.write(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        return 0
    if options.command == "check":
        return _check(options.where, everything=options.all)
    statuses = {patch.name: ledger.status(patch) for patch in ledger.PATCHES}
    sys.stdout.write(ledger.render_text(statuses))
    return int(any(state.startswith("drifted") for state in statuses.values()))


def _check(where: str, *, everything: bool) -> int:
    try:
        with release.opened(where) as root:
            version = release.version_in(root)
            series = release.nearest(version)
            lines = release.compared(root, ledger.PATCHES, series)
    except CompatError as error:
        print(error, file=sys.stderr)
        return 2
    sys.stdout.write(release.report(version, series, lines, everything=everything))
    return int(any(line.verdict != "fits" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
