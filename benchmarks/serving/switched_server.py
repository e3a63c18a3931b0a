# SPDX-License-Identifier: Apache-2.0
"""vLLM's command line with a switch for the records of turns, which works while it runs.

    python -m benchmarks.serving.switched_server FILE serve MODEL ...

The first byte of FILE says whether turns are recorded. All processes map it into their memory. So
two turns that differ in nothing else can be compared within one server.

vLLM's engine core is spawned, and a spawned process imports the main module again: so this file
runs in it (as ``__mp_main__``), before vLLM does.
"""

import functools
import mmap
import multiprocessing
import os
import sys
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

FILE_ENV = "SERVING_BENCH_SWITCH"
ON, OFF = b"\x01", b"\x00"


class Switch:
    """One byte that several processes share."""

    def __init__(self, path: Path, *, is_new: bool = False) -> None:
        if is_new:
            path.write_bytes(ON)
        with path.open("r+b") as file:
            self._byte = mmap.mmap(file.fileno(), 1)

    def turn(self, *, on: bool) -> None:
        """Record the turns that begin from now on, or do not."""
        self._byte[0:1] = ON if on else OFF

    def is_on(self) -> bool:
        return self._byte[0] == ON[0]


def _switch_api(switch: Switch) -> None:
    """What the API server notes of a request, and tells the engine of it."""
    from vllm_stateful.adapters.frontend import identity

    recorded = identity.process_config()
    unrecorded = replace(recorded, explain="off")
    identity.process_config = lambda: recorded if switch.is_on() else unrecorded


def _switch_engine(switch: Switch) -> None:
    """The records of the KV cache manager, which its methods look at in each turn."""
    from vllm_stateful.adapters.engine.kv_lookup import KVLookup

    def records(manager: Any) -> Any:
        return vars(manager).get("records") if switch.is_on() else None

    def keep(manager: Any, made: Any) -> None:
        vars(manager)["records"] = made

    KVLookup.records = property(records, keep)


def _prepare_api() -> None:
    """vLLM runs its API server with ``uvloop.run``, when plugins are active already."""
    import uvloop

    stock_run = uvloop.run

    def run(main: Coroutine[Any, Any, Any], **options: Any) -> Any:
        _switch_api(Switch(Path(os.environ[FILE_ENV])))
        return stock_run(main, **options)

    uvloop.run = run


def _prepare_engine() -> None:
    if not multiprocessing.current_process().name.startswith("EngineCore"):
        return
    from vllm.v1.engine.core import EngineCoreProc

    stock_loop = EngineCoreProc.run_busy_loop

    @functools.wraps(stock_loop)
    def busy_loop(self: Any) -> Any:
        _switch_engine(Switch(Path(os.environ[FILE_ENV])))
        return stock_loop(self)

    EngineCoreProc.run_busy_loop = busy_loop


def main() -> None:
    """Run vLLM's command line with what stands behind FILE."""
    os.environ[FILE_ENV] = str(Path(sys.argv.pop(1)).resolve())
    _prepare_api()
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    _prepare_engine()
