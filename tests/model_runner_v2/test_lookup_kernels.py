# SPDX-License-Identifier: Apache-2.0
"""The look-up on the device against a naive one, in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_random_texts_and_verdicts() -> None:
    script = Path(__file__).parent / "lookup.py"
    done = subprocess.run(
        [sys.executable, script, "25"], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.stdout.strip().endswith("all right"), (done.stdout + done.stderr)[-4000:]
