# SPDX-License-Identifier: Apache-2.0
"""vLLM's command line with other chances for drafts to start from.

    python -m benchmarks.serving.primed_server PRIORS.npy serve MODEL ...

The product has no option for that. vLLM's engine core is a spawned process, and a spawned process
imports the main module again: so this file runs in it (as ``__mp_main__``), before vLLM does. The
chances are replaced when the busy loop starts: all is built then, and no agent was met. The log
then says so in one line (``said``).
"""

import functools
import multiprocessing
import os
import sys
import zlib
from pathlib import Path
from typing import Any

PRIORS_ENV = "SERVING_BENCH_PRIORS"


def said(path: Path) -> str:
    """What the server's log says when its drafts start from the chances in a file."""
    return f"drafts start from {path.name}, checksum {zlib.crc32(path.read_bytes()):08x}"


def _use() -> None:
    import numpy as np

    from benchmarks.speculate import priors

    path = Path(os.environ[PRIORS_ENV])
    priors.use(np.load(path))
    print(said(path), flush=True)


def _prepare_child() -> None:
    if not multiprocessing.current_process().name.startswith("EngineCore"):
        return
    from vllm.v1.engine.core import EngineCoreProc

    stock_loop = EngineCoreProc.run_busy_loop

    @functools.wraps(stock_loop)
    def run_busy_loop(self: Any) -> Any:
        _use()
        return stock_loop(self)

    EngineCoreProc.run_busy_loop = run_busy_loop


def main() -> None:
    """Run vLLM's command line with what stands behind PRIORS.npy."""
    os.environ[PRIORS_ENV] = str(Path(sys.argv.pop(1)).resolve())
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    _prepare_child()
