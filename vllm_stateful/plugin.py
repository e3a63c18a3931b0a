# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in every process (``vllm.general_plugins``).

The plugin is turned on by ``vllm serve --plugin stateful`` or by ``VLLM_STATEFUL=1``. If it is
installed but not turned on, it does nothing: it imports nothing of vLLM and applies no patch.
"""

import sys
from collections.abc import Sequence
from typing import Any

from vllm_stateful.config import is_enabled

_CLI_WORDS = ("--plugin", "--stateful-", "--help", "--config")


def register() -> None:
    """Install what this process needs. A second call changes nothing."""
    enabled = is_enabled()
    if not enabled and not _asks_for_cli(sys.argv):
        return
    from vllm_stateful.adapters import activation

    activation.install_command_line()
    if enabled:
        activation.activate()


def make_endpoint_plugin() -> Any:
    """Make the plugin with our routes and metrics. The entry point of ``vllm.endpoint_plugins``."""
    from vllm_stateful.adapters.fit import off_reason

    if not is_enabled() or off_reason() is not None:  # the reason was logged already
        return _NoEndpoint()
    from vllm_stateful.adapters.frontend.endpoint import StatefulEndpoint

    return StatefulEndpoint()


class _NoEndpoint:
    """A plugin without routes. The factory needs it, as vLLM uses whatever the factory returns."""

    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Attach nothing."""

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Do nothing."""


def _asks_for_cli(argv: Sequence[str]) -> bool:
    """Whether this command line may have an option of ours, or ask for help."""
    return any(arg == "-h" or arg.startswith(_CLI_WORDS) for arg in argv[1:])
