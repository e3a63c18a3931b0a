# SPDX-License-Identifier: Apache-2.0
"""The look-up on the device against a naive one, in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_random_texts_and_verdicts() -> None:
    script = Path(__file__).parent / "lookup.py"
    done = subprocess.run(
        [sys.executable, script, "10"], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.stdout.strip().endswith("all right"), (done.stdout + done.stderr)[-4000:]


def test_one_of_two_drafts_is_chosen() -> None:
    """Beside a head, against a naive choice."""
    script = Path(__file__).parent / "beside.py"
    done = subprocess.run(
        [sys.executable, script, "25"], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.stdout.strip().endswith("all right"), (done.stdout + done.stderr)[-4000:]


def test_ids_of_any_number_arrive_in_their_row() -> None:
    """More than one program writes, and nothing but the row's own part."""
    script = Path(__file__).parent / "rows.py"
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.stdout.strip().endswith("all right"), (done.stdout + done.stderr)[-4000:]


def test_they_compile_for_gpus() -> None:
    """To machine code, as Triton does on a GPU; what the interpreter takes need not compile."""
    script = Path(__file__).parent / "compile_kernels.py"
    capabilities = ["80", "90", "100", "120"]
    done = subprocess.run(
        [sys.executable, script, *capabilities],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert len(done.stdout.splitlines()) == 7 * len(capabilities)
