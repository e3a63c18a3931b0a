# SPDX-License-Identifier: Apache-2.0
"""Says what of the plugin does not fit this vLLM or this server, in one process, and why."""

from __future__ import annotations

import os

from vllm.logger import init_logger

from vllm_stateful.compat import probe, uses
from vllm_stateful.compat.patch import CompatError, Process, off_line
from vllm_stateful.config import process_config
from vllm_stateful.errors import UnsupportedError

logger = init_logger("vllm.stateful")

OFF_ENV = "STATEFUL_OFF_REASON"
"""Set by the process that starts the others, if requests of different tenants cannot be told apart.
If an engine kept sessions all the same, all API keys would share them."""

_problems: list[str] = []

_said: set[str] = set()
"""Drifts that are already in the log. Several features may use what has drifted."""


def problems() -> tuple[str, ...]:
    """Why the plugin, or a part of it, is off in this process."""
    return tuple(_problems)


def add_problem(text: str) -> None:
    """Remember why something is off, without a line in the log."""
    if text not in _problems:
        _problems.append(text)


def report_problem(text: str) -> None:
    """Log one line, and go on as stock vLLM.

    Raises:
        UnsupportedError: the plugin is strict.
    """
    add_problem(text)
    if process_config().strict:
        raise UnsupportedError(text)
    logger.warning("stateful: off, serving as stock vLLM: %s", text)


def off_reason() -> str | None:
    """Why the whole plugin is off: an unknown vLLM, or ``OFF_ENV``; None when it is not."""
    return probe.unsupported_reason(probe.vllm_version()) or os.environ.get(OFF_ENV)


def check(feature: str, processes: frozenset[Process]) -> None:
    """Check that what a feature uses of vLLM is there.

    What the engine and its workers use is checked in their own processes (`is_fit`), because
    importing it takes seconds.

    Raises:
        CompatError: something is not there.
    """
    try:
        uses.check(feature, frozenset({"api", "all"}) if "api" in processes else processes)
    except CompatError as error:
        _said.add(str(error))
        raise


def drift_of(feature: str, process: Process) -> str | None:
    """What of vLLM a feature does not fit; None when it fits."""
    try:
        uses.check(feature, frozenset({process, "all"}))
    except CompatError as error:
        return str(error)
    return None


def is_fit(feature: str, process: Process) -> bool:
    """Whether a feature fits this vLLM; if it does not, the log says so, once in a process.

    Raises:
        UnsupportedError: it does not fit, and the plugin is strict.
    """
    drift = drift_of(feature, process)
    if drift is None:
        return True
    line = off_line([feature], drift)
    add_problem(line)
    if process_config().strict:
        raise UnsupportedError(line)
    if drift not in _said:
        _said.add(drift)
        logger.warning("stateful: %s", line)
    return False
