# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against float64, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import ROOT

pytest.importorskip("triton", reason="Triton is not installed")


def test_triton_against_the_oracle() -> None:
    script = Path(__file__).parent / "interpreted.py"
    done = subprocess.run(
        [sys.executable, str(script), "24"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
