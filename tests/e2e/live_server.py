# SPDX-License-Identifier: Apache-2.0
"""A running `vllm serve`: start it, wait for it, stop it with everything that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from benchmarks.ports import free_port

START_SECONDS = 600


class LiveServer:
    """One server; use as a context manager.

    Args:
        model: folder of the model.
        log: what it prints goes here.
        options: of ``vllm serve``.
        environment: beside that of this process.
    """

    def __init__(
        self, model: Path, log: Path, *options: str, environment: dict[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        self._command += ["--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        self._command += options
        ours = "VLLM_STATEFUL"  # other tests of this process may have set some
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(ours)},
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            **(environment or {}),
        }

    def __enter__(self) -> LiveServer:
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and all its processes. Does nothing when it is gone."""
        for how, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                return

    def last_words(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-6000:]

    def metric(self, name: str, **labels: str) -> float:
        """The current value of one metric, after the next poll."""
        time.sleep(1.5)
        wanted = ",".join(f'{key}="{value}"' for key, value in labels.items())
        line = f"{name}{{{wanted}}} " if labels else f"{name} "
        for found in httpx.get(f"{self.url}/metrics").text.splitlines():
            if found.startswith(line):
                return float(found.rsplit(" ", 1)[1])
        return 0.0

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.last_words()
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(1)
        raise AssertionError(f"not up after {START_SECONDS} s:\n{self.last_words()}")
