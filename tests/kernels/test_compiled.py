# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the kernels: registers that fit, and the instructions they are written for."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulator import CSRC

from vllm_stateful.attention import ops

FP8_ARCH = "90a"  # vLLM's backend has fp8 there and later; the others take as long to compile
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not here")


def compiled(arch: str, folder: Path) -> tuple[Path, str]:
    """The object of head size 128, and what ptxas says of it."""
    made = folder / f"budget_{arch}.o"
    command = [NVCC, "-std=c++17", "-O3", f"-I{CSRC / 'include'}", "-Xptxas", "-v"]
    command += ["-DSTATEFUL_FP8"] if arch == FP8_ARCH else []
    command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    source = Path(__file__).parent / "budget.cu"
    done = subprocess.run(
        [*map(str, command), "-c", source, "-o", made], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return made, done.stderr


def disassembler() -> Path | None:
    """Triton carries one."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


@pytest.mark.parametrize("arch", ["80", "90a", "100f", "120f"])
def test_nothing_is_spilled_at_head_size_128(arch: str, tmp_path: Path) -> None:
    made, said = compiled(arch, tmp_path)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) == (7 if arch == FP8_ARCH else 4)
    assert set(spills) == {("0", "0")}, said
    assert "warning" not in said
    if arch == FP8_ARCH and (tool := disassembler()):
        shown = subprocess.run([tool, "-sass", made], capture_output=True, text=True, check=True)
        assert "HGMMA.64x128x16.F32.BF16" in shown.stdout
        assert "UTMALDG.4D" in shown.stdout
        assert "USETMAXREG" in shown.stdout
        assert "F2FP.F16.E4M3.UNPACK_B" in shown.stdout  # fp8 to half by an instruction of its own


def test_without_a_device_a_call_says_why() -> None:
    reason = ops.why_unavailable()
    if not reason:
        pytest.skip("a device is here")
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        ops.num_ctas(torch.bfloat16, 128, 64, 0)
