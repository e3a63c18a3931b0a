# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in every process (``vllm.general_plugins``).

Installed but not asked for, it does nothing: no import of vLLM's internals, no patch. It is
asked for by ``vllm serve --plugin stateful`` or by ``VLLM_STATEFUL=1``.
"""

import os
import sys
from collections.abc import Sequence

from vllm_stateful.config import ENABLE_ENV, is_enabled

_CLI_WORDS = ("--plugin", "--stateful-", "--help", "--config")


def register() -> None:
    """Install what this process needs. Re-entrant: a second call changes nothing."""
    wants_cli = _asks_for_cli(sys.argv)
    if not wants_cli and not os.environ.get(ENABLE_ENV):
        return
    from vllm_stateful.adapters import activation

    if wants_cli:
        activation.install_command_line()
    if is_enabled():
        activation.activate()


def _asks_for_cli(argv: Sequence[str]) -> bool:
    """Whether this command line may name an option of ours, or ask for help."""
    return any(arg == "-h" or arg.startswith(_CLI_WORDS) for arg in argv[1:])
