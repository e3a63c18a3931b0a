# SPDX-License-Identifier: Apache-2.0
"""A vLLM server as a process group of its own: start it, wait for it, and always stop it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from benchmarks.models import TOOLS_TEMPLATE
from benchmarks.ports import HOST

MODEL_NAME = "smollm2-135m"
START_LIMIT_S = 600
STOP_LIMIT_S = 20
NUM_TAIL_LINES = 25


class ServerFailedError(RuntimeError):
    """A server ended, or did not answer in time; the message holds the end of its log."""


@dataclass(frozen=True)
class ServerOptions:
    """What all servers have in common."""

    model: Path
    dtype: str
    kv_gib: int
    block_size: int
    max_model_len: int = 8192


def serve_command(options: ServerOptions, port: int, extra: Sequence[str]) -> list[str]:
    """The arguments of `vllm serve`; nothing but `extra` differs between the servers."""
    return [
        "serve",
        str(options.model),
        *("--served-model-name", MODEL_NAME),
        *("--host", HOST, "--port", str(port)),
        *("--dtype", options.dtype),
        *("--max-model-len", str(options.max_model_len)),
        *("--block-size", str(options.block_size)),
        *("--chat-template", str(TOOLS_TEMPLATE)),
        "--enable-auto-tool-choice",
        *("--tool-call-parser", "hermes"),
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        *extra,
    ]


class Server:
    """One running `vllm serve`; use it in a `with` block, which stops the whole group."""

    def __init__(
        self, name: str, options: ServerOptions, log: Path, extra: Sequence[str], port: int
    ) -> None:
        self.name = name
        self.port = port
        self.log = log
        self.ready_after_s: float | None = None
        self._arguments = serve_command(options, port, extra)
        self._environment = _environment(options, is_stock="--plugin" not in extra)
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._started_at = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.cli.main", *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the process was started."""
        return time.monotonic() - self._started_at

    def wait_until_ready(self, on_progress: Callable[[], None]) -> None:
        """Return when it answers; raises ServerFailedError with the log's end if it never will."""
        while not self._is_healthy():
            self.check_alive()
            if self.elapsed_s > START_LIMIT_S:
                raise ServerFailedError(self._report(f"no answer within {START_LIMIT_S} s"))
            on_progress()
            time.sleep(0.5)
        self.ready_after_s = self.elapsed_s
        on_progress()

    def check_alive(self) -> None:
        """Raise ServerFailedError when the process has ended."""
        code = self._process.poll() if self._process else None
        if code is not None:
            raise ServerFailedError(self._report(f"ended with exit status {code}"))

    def last_log_line(self) -> str:
        """The last line of the log that is not empty."""
        lines = [line for line in self._tail(5) if line.strip()]
        return lines[-1].strip() if lines else "starting"

    def stop(self) -> None:
        """Ask the server to end, then kill whatever is left of its group."""
        process, self._process = self._process, None
        if process is not None:
            stop_group(process)

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _tail(self, num_lines: int) -> list[str]:
        with self.log.open(errors="replace") as file:
            return list(deque((line.rstrip() for line in file), maxlen=num_lines))

    def _report(self, problem: str) -> str:
        tail = "\n".join(f"    {line}" for line in self._tail(NUM_TAIL_LINES))
        return f"the {self.name} server: {problem}. The end of {self.log}:\n{tail}"


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, then kill whatever is left of its group, which it must lead."""
    try:
        if process.poll() is None:
            process.terminate()
        deadline = time.monotonic() + STOP_LIMIT_S
        while _group_exists(process) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _group_exists(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process of the group is left; collects the leader when it has ended."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


# On CPU vLLM 0.32 cannot load the AOT artifact it has saved ("no attribute 'finalize_loading'") and
# compiles again at every start. Inductor's own cache does work, and makes the same code.
# Stock's own n-gram drafts use numba, whose OpenMP layer leaves the worker's kernels one thread.
DEFAULTS = {"VLLM_USE_AOT_COMPILE": "0", "NUMBA_THREADING_LAYER": "workqueue"}
INTEL_OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"
"""Comes with vLLM for CPUs, which asks for it to be preloaded on x86. All servers get it."""
if INTEL_OPENMP.is_file():
    DEFAULTS["LD_PRELOAD"] = str(INTEL_OPENMP)


def _environment(options: ServerOptions, *, is_stock: bool) -> dict[str, str]:
    """The caller's environment; what would switch the plugin on is kept from the stock server."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not (is_stock and name.startswith("VLLM_STATEFUL"))
    }
    return (
        DEFAULTS
        | environment
        | {
            "VLLM_CPU_KVCACHE_SPACE": str(options.kv_gib),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
        }
    )
