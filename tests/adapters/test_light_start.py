# SPDX-License-Identifier: Apache-2.0
"""An engine that was not asked for drafts does not load the compiler of their index."""

from __future__ import annotations

import subprocess
import sys

WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import vllm_stateful.adapters.engine.scheduler as scheduler
scheduler.stateful_scheduler_class(scheduler.Scheduler)
"""


def test_the_scheduler_needs_no_numba() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
