# SPDX-License-Identifier: Apache-2.0
"""The servers, stock and with the plugin, each a process group that always ends."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from benchmarks.demo.servers import ServerFailedError, stop_group
from benchmarks.ports import HOST, free_port

STOCK, PLUGIN = "stock", "plugin"
SIDES = (STOCK, PLUGIN)
FAST = "fast"
"""The plugin with `--stateful-profile fast`."""
OURS = {PLUGIN: (), FAST: ("--stateful-profile", "fast")}
"""The options of the sides with the plugin, behind `--plugin stateful`."""
NGRAM = "ngram"
"""Stock vLLM with its own drafts from the prompt."""
MODEL_NAME = "tiny"
MAX_MODEL_LEN = 262144
KV_GIB = 2
START_LIMIT_S = 600
RESET_TRIES = 10
NUM_TAIL_LINES = 40
_CACHE_SIZE = re.compile(r"KV cache size: ([\d,]+) tokens")


@dataclass(frozen=True)
class Settings:
    """What all sides have in common beside the model; the default is for a one-layer model.

    Attributes:
        side_arguments: of `vllm serve`, for one side each.
        is_eager: without compiling the model.
        dtype: of weights and KV; float32 gives all sides the same answers.
        launchers: modules that run `vllm`, with their arguments, for one side each.
    """

    model_name: str = MODEL_NAME
    max_model_len: int = MAX_MODEL_LEN
    arguments: tuple[str, ...] = ("--max-num-batched-tokens", "8192")
    kv_gib: int = KV_GIB
    environment: Mapping[str, str] = field(default_factory=dict)
    side_arguments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_eager: bool = True
    dtype: str = "float32"
    launchers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


ONE_LAYER = Settings()


def serve_command(model: Path, port: int, side: str, settings: Settings = ONE_LAYER) -> list[str]:
    """The arguments of `vllm`; the sides differ in `--plugin stateful` and their own arguments."""
    return [
        "serve",
        str(model),
        *("--served-model-name", settings.model_name),
        *("--host", HOST, "--port", str(port)),
        *("--max-model-len", str(settings.max_model_len)),
        *("--dtype", settings.dtype),
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        *(("--enforce-eager",) if settings.is_eager else ()),
        *settings.arguments,
        *settings.side_arguments.get(side, ()),
        *(("--plugin", "stateful", *OURS[side]) if side in OURS else ()),
    ]


def environment(side: str, settings: Settings = ONE_LAYER) -> dict[str, str]:
    """The caller's, without what would switch the plugin on in the stock server."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not (side not in OURS and name.startswith("VLLM_STATEFUL"))
    }
    common = {
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_gib),
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return inherited | common | dict(settings.environment)


class Server:
    """One running server; its times lie in `times` when it was started with timers."""

    def __init__(
        self,
        side: str,
        model: Path,
        logs: Path,
        *,
        is_timed: bool,
        settings: Settings = ONE_LAYER,
    ) -> None:
        self.side = side
        self.port = free_port()
        self.log = logs / f"{side}.log"
        self.times = logs / f"{side}.times.d"
        self._is_timed = is_timed
        timed = ("benchmarks.serving.timed_server", str(self.times))
        self._launcher = timed if is_timed else settings.launchers.get(side, ())
        self._arguments = serve_command(model, self.port, side, settings)
        self._environment = environment(side, settings)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        self.times.mkdir(parents=True, exist_ok=True)
        for old in self.times.glob("*.times"):
            old.unlink()
        program = [str(Path(sys.executable).with_name("vllm"))]
        if self._launcher:
            program = [sys.executable, "-m", *self._launcher]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*program, *self._arguments],
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
        process, self._process = self._process, None
        if process is not None:
            stop_group(process)

    def kill(self) -> None:
        """End the whole group at once, as a crash of its machine would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait_until_ready(self) -> float:
        """Seconds until it answered.

        Raises:
            ServerFailedError: it ended or never answered; with the end of its log.
        """
        start = time.monotonic()
        while time.monotonic() - start < START_LIMIT_S:
            self.check_alive()
            with contextlib.suppress(httpx.TransportError):
                health = httpx.get(f"{self.url}/health", timeout=2)
                if health.status_code == httpx.codes.OK:
                    return time.monotonic() - start
            time.sleep(0.5)
        raise ServerFailedError(self.report(f"no answer within {START_LIMIT_S} s"))

    def check_alive(self) -> None:
        """Raise ServerFailedError, with the end of its log, when the server has ended."""
        code = self._process.poll() if self._process else None
        if code is not None:
            raise ServerFailedError(self.report(f"ended with exit status {code}"))

    def report(self, problem: str) -> str:
        """The problem and the end of the log."""
        lines = self.log.read_text(errors="replace").splitlines()[-NUM_TAIL_LINES:]
        tail = "\n".join(f"    {line}" for line in lines)
        return f"the {self.side} server: {problem}. The end of {self.log}:\n{tail}"

    def reset_prefix_cache(self) -> None:
        """Forget all KV, sessions included; needs VLLM_SERVER_DEV_MODE=1 and a server at rest.

        Raises:
            ServerFailedError: it does not; blocks are still in use, or there is no such route.
        """
        answer = "no answer"
        for _ in range(RESET_TRIES):
            answer = httpx.post(f"{self.url}/reset_prefix_cache", timeout=60).text
            if json.loads(answer or "{}").get("success"):
                return
            time.sleep(0.5)
        raise ServerFailedError(self.report(f"the prefix cache was not reset ({answer})"))

    def metrics(self) -> dict[str, float]:
        """Everything at /metrics but buckets, by name with labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
        return {name: float(value) for name, value in pairs if "_bucket{" not in name}

    def num_cache_tokens(self) -> int:
        """How many tokens its KV cache holds, as its log says it.

        Raises:
            ServerFailedError: the log does not say it.
        """
        found = _CACHE_SIZE.search(self.log.read_text(errors="replace"))
        if found is None:
            raise ServerFailedError(self.report("no cache size in the log"))
        return int(found[1].replace(",", ""))

    @contextmanager
    def probed_loop(self) -> Iterator[None]:
        """Watch the server's event loop; only a server with timers can do that."""
        assert self._process is not None
        assert self._is_timed
        self._process.send_signal(signal.SIGUSR1)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGUSR2)


@contextmanager
def running_servers(
    model: Path,
    logs: Path,
    say: Callable[[str], None],
    *,
    is_timed: bool = False,
    settings: Settings = ONE_LAYER,
    sides: Sequence[str] = SIDES,
) -> Iterator[dict[str, Server]]:
    """Stock and plugin, or other sides, started one after the other."""
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        servers = {}
        for side in sides:
            server = stack.enter_context(
                Server(side, model, logs, is_timed=is_timed, settings=settings)
            )
            say(f"{side}: starting, log in {server.log}")
            say(f"{side}: ready after {server.wait_until_ready():.0f} s")
            servers[side] = server
        yield servers
