# SPDX-License-Identifier: Apache-2.0
"""vLLM's command line with a timer around each stage of a request.

    python -m benchmarks.serving.timed_server LOGDIR serve MODEL ...

vLLM's CPU workers are spawned, and a spawned process imports the main module again: so this file
runs in each of them (as ``__mp_main__``), before vLLM does. The timers are put in place as late as
possible, so that they stand outside of a plugin's patches and see its subclasses: in the API
process when the event loop starts, in the others when their busy loop starts.

Each process appends ``stage<TAB>start<TAB>end`` lines (``time.perf_counter``, one clock for all
processes on Linux) to its own file in LOGDIR. A call costs about 1 us; a thread writes.

SIGUSR1 to the API process starts a probe of its event loop, SIGUSR2 stops it: a callback every
millisecond writes down when it came late. uvloop's timers tick in milliseconds, so its resolution
is about 2 ms; a block shorter than that is not seen. What the thread waited for a core meanwhile,
as the kernel counts it, is not the server's doing and is left out. Beside it stands what the thread
worked between two callbacks, in CPU time, which has no such resolution but holds no waiting at all.
"""

import asyncio
import functools
import importlib
import inspect
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.serving.stages import (
    API,
    CORE,
    LOOP_BLOCKED,
    LOOP_WORK,
    MISSING,
    STAGES,
    WORKER,
    Stage,
)

FOLDER_ENV = "SERVING_BENCH_TIMES"
FLUSH_S = 0.5
TICK_S = 0.001
MIN_BLOCK_S = 0.001
SCHEDSTAT = "/proc/thread-self/schedstat"

_now = time.perf_counter


class Recorder:
    """The file of one process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: deque[tuple[str, float, float]] = deque()
        self.add = self._waiting.append
        threading.Thread(target=self._write_for_ever, name="stage-times", daemon=True).start()

    def missing(self, target: str) -> None:
        """Say once that there is nothing to time."""
        print(f"timed_server: no timer, nothing found at {target}", flush=True)
        with self._path.open("a") as file:
            file.write(f"{MISSING}\t{target}\n")

    def _write_for_ever(self) -> None:
        while True:
            time.sleep(FLUSH_S)
            lines = []
            while self._waiting:
                stage, start, end = self._waiting.popleft()
                lines.append(f"{stage}\t{start:.7f}\t{end:.7f}\n")
            if lines:
                with self._path.open("a") as file:
                    file.write("".join(lines))


class LoopProbe:
    """Writes down when the event loop was late for a callback every millisecond, and its work."""

    def __init__(self, recorder: Recorder, loop: asyncio.AbstractEventLoop) -> None:
        self._recorder = recorder
        self._loop = loop
        self._schedstat = os.open(SCHEDSTAT, os.O_RDONLY) if os.path.exists(SCHEDSTAT) else -1
        self._last = self._clocks()
        self._is_on = False
        loop.add_signal_handler(signal.SIGUSR1, self._start)
        loop.add_signal_handler(signal.SIGUSR2, self._stop)

    def _start(self) -> None:
        if not self._is_on:
            self._is_on = True
            self._last = self._clocks()
            self._loop.call_later(TICK_S, self._tick)

    def _stop(self) -> None:
        self._is_on = False

    def _clocks(self) -> "_Clocks":
        """In the loop's thread, whose file was opened."""
        waited_ns = int(os.pread(self._schedstat, 99, 0).split()[1]) if self._schedstat >= 0 else 0
        return _Clocks(_now(), time.thread_time(), waited_ns * 1e-9)

    def _tick(self) -> None:
        now, last = self._clocks(), self._last
        blocked_s = now.wall_s - last.wall_s - TICK_S - (now.waited_s - last.waited_s)
        if blocked_s >= MIN_BLOCK_S:
            self._recorder.add((LOOP_BLOCKED, now.wall_s - blocked_s, now.wall_s))
        worked_s = now.worked_s - last.worked_s
        if worked_s >= MIN_BLOCK_S:
            self._recorder.add((LOOP_WORK, now.wall_s - worked_s, now.wall_s))
        self._last = now
        if self._is_on:
            self._loop.call_later(TICK_S, self._tick)


class _Clocks(NamedTuple):
    """Of the calling thread, in seconds."""

    wall_s: float
    worked_s: float
    waited_s: float
    """For a core while it was ready to run; 0 where the kernel does not count it."""


def install(recorder: Recorder, process: str) -> None:
    """Put a timer around each stage that runs in this process."""
    for stage in STAGES:
        if stage.process == process and not _install(recorder, stage):
            recorder.missing(stage.target)


def _install(recorder: Recorder, stage: Stage) -> bool:
    module, _, path = stage.target.partition(":")
    *owners, name = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
    except (ImportError, AttributeError):
        return False
    places = [place for place in _with_subclasses(owner) if name in vars(place)]
    for place in places:
        function = vars(place)[name]
        if isinstance(function, staticmethod | classmethod):
            timed: Any = type(function)(_timed(function.__func__, stage.name, recorder))
        else:
            timed = _timed(function, stage.name, recorder)
        setattr(place, name, timed)
    return bool(places)


def _with_subclasses(owner: Any) -> Iterator[Any]:
    """The module, or the class and every class made from it so far."""
    found: list[Any] = []
    waiting: list[Any] = [owner]
    while waiting:
        found.append(waiting.pop())
        if isinstance(found[-1], type):
            waiting += type.__subclasses__(found[-1])
    yield from dict.fromkeys(found)


def _timed(function: Callable[..., Any], name: str, recorder: Recorder) -> Callable[..., Any]:
    add = recorder.add
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def timed_async(*args: Any, **kwargs: Any) -> Any:
            start = _now()
            try:
                return await function(*args, **kwargs)
            finally:
                add((name, start, _now()))

        return timed_async

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = _now()
        try:
            return function(*args, **kwargs)
        finally:
            add((name, start, _now()))

    return timed


def _recorder(process: str) -> Recorder:
    return Recorder(Path(os.environ[FOLDER_ENV]) / f"{process}-{os.getpid()}.times")


def _prepare_api() -> None:
    """vLLM runs its API server with ``uvloop.run``, when plugins are active already."""
    import uvloop

    stock_run = uvloop.run

    def run(main: Coroutine[Any, Any, Any], **options: Any) -> Any:
        from vllm.renderers.registry import RENDERER_REGISTRY

        importlib.import_module(RENDERER_REGISTRY.renderers["hf"][0])
        recorder = _recorder(API)
        install(recorder, API)

        async def run_main() -> Any:
            probe = LoopProbe(recorder, asyncio.get_running_loop())
            try:
                return await main
            finally:
                del probe

        return stock_run(run_main(), **options)

    uvloop.run = run


def _prepare_loop(owner: Any, name: str, process: str) -> None:
    """Install the timers when this busy loop starts: everything is built then."""
    stock_loop = getattr(owner, name)

    @functools.wraps(stock_loop)
    def busy_loop(self: Any) -> Any:
        install(_recorder(process), process)
        return stock_loop(self)

    setattr(owner, name, busy_loop)


def _prepare_child() -> None:
    name = multiprocessing.current_process().name
    if name.startswith("EngineCore"):
        from vllm.v1.engine.core import EngineCoreProc

        _prepare_loop(EngineCoreProc, "run_busy_loop", CORE)
    elif name.startswith("VllmWorker"):
        from vllm.v1.executor.multiproc_executor import WorkerProc

        _prepare_loop(WorkerProc, "worker_busy_loop", WORKER)


def main() -> None:
    """Run vLLM's command line with what stands behind LOGDIR."""
    folder = Path(sys.argv.pop(1)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[FOLDER_ENV] = str(folder)
    _prepare_api()
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    _prepare_child()
