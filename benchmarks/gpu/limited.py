# SPDX-License-Identifier: Apache-2.0
"""Processes with a time limit of their own, and results that are on disk as soon as they exist.

Device time is scarce. A fault, a hang or a wrong answer may cost the one process that has it, never
what was measured before or is to be measured after.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TAIL_CHARS = 1500


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON object as a line, and have it on disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that `append_row` wrote; a last line that was cut off is left out."""
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that was started with `start_new_session`, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_limited(
    command: Sequence[str | Path],
    seconds: float,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a command to its end or to its limit.

    Args:
        command: The program and its arguments.
        seconds: It is killed after them, with everything that it started.
        log: Gets what it prints, behind what is there.
        environment: Added to this process's own.

    Returns:
        Why it did not end well, with the end of what it printed; empty: it did.
    """
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            [*map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            problem = f"ended by its limit of {seconds:.0f} s"
        else:
            problem = f"exit status {code}" if code else ""
        finally:
            end_group(process)
    if not problem:
        return ""
    said = log.read_bytes()[begin:].decode(errors="replace")
    return f"{problem}: {said[-TAIL_CHARS:]}".strip()
