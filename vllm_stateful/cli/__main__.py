# SPDX-License-Identifier: Apache-2.0
"""Runs ``vllm-stateful COMMAND``, or ``python -m vllm_stateful.cli COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm_stateful import __version__
from vllm_stateful.cli import doctor, explain, top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="vllm-stateful", description="Tools beside a vLLM server with stateful sessions."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for each in (doctor, explain, top):
        each.add_command(commands)
    options, others = parser.parse_known_args(words)
    if others and not options.takes_others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return int(options.run(options, others))


if __name__ == "__main__":
    sys.exit(main())
