# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_stateful.compat``: what is patched, where, why, does it fit, when does it go."""

import argparse
import sys

from vllm_stateful.compat import ledger


def main() -> int:
    """Print the ledger. Returns 1 when a patch does not fit the installed vLLM."""
    parser = argparse.ArgumentParser(prog="python -m vllm_stateful.compat", description=__doc__)
    parser.add_argument(
        "--markdown", action="store_true", help="print what patches/README.md holds"
    )
    if parser.parse_args().markdown:
        sys.stdout.write(ledger.render_markdown())
        return 0
    statuses = {patch.name: ledger.status(patch) for patch in ledger.PATCHES}
    sys.stdout.write(ledger.render_text(statuses))
    return int(any(state.startswith("drifted") for state in statuses.values()))


if __name__ == "__main__":
    sys.exit(main())
