# SPDX-License-Identifier: Apache-2.0
"""Helper processes that answer questions, one JSON object a line, each under a time limit.

What is compared lives in processes of its own, so that a fault in one (an illegal access ends a
whole CUDA context) leaves the others, and yet is measured turn about: a worker that is not asked
does nothing.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.limited import TAIL_CHARS, end_group

Answer = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker ended, said that it failed, or did not answer in time."""


class Worker:
    """One helper process.

    Args:
        command: What runs `serve`.
        log: Gets what it prints.
        environment: Added to this process's own.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        self._answers = b""
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                bufsize=0,
            )

    def ask(self, **question: Any) -> None:
        """Send a question. That the worker is gone shows when its answer is waited for."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
        except BrokenPipeError:
            return

    def answer(self, until: float) -> Answer:
        """Wait for the answer to the oldest question.

        Args:
            until: By `time.monotonic`.

        Raises:
            WorkerError: there is none, or it says that it failed. Where there is none the worker is
                of no more use: `close` it.
        """
        assert self._process.stdout is not None
        while b"\n" not in self._answers:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise WorkerError("no answer in time")
            part = self._process.stdout.read(65536)
            if not part:
                code = self._process.wait()
                raise WorkerError(f"ended with exit status {code}: {self._tail()}")
            self._answers += part
        line, self._answers = self._answers.split(b"\n", 1)
        found: Answer = json.loads(line)
        if "failed" in found:
            raise WorkerError(found["failed"])
        return found

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End it, whatever it is doing."""
        end_group(self._process)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-TAIL_CHARS:].strip()


def serve(answer: Callable[[dict[str, Any]], Answer]) -> None:
    """Answer questions until there are no more. An error is the answer to its question.

    What anything prints goes to standard error: standard output is for answers.
    """
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lines: Iterable[str] = sys.stdin
    for line in lines:
        try:
            found = answer(json.loads(line))
        except Exception as error:  # of a library, whatever it is: whoever asked is told
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
        out.write(json.dumps(found) + "\n")
        out.flush()
