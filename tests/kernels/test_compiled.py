# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the kernels: registers that fit, the instructions they are written for, and
none that ptxas is known to get wrong.

Compiling takes minutes. So only for Hopper all head sizes are compiled, and for the others the one
whose registers are checked, unless STATEFUL_ALL_KERNELS is set.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulator import CSRC

from vllm_stateful.attention import ops

ARCHS = ("80", "90a", "100f", "120f")
HOPPER = "90a"
OTHER_HEAD_SIZES = re.compile(r"^ *case (?:64|256): return choose_rows<.*\n", re.M)
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not here")

FUSED = re.compile(r"\w*MNMX\S*\s+U?R\w+,\s*U?P[0-6]\b")
"""A minimum or maximum that also answers a comparison: the answer is wrong (csrc/ptxas-vimnmx.md).

Its predicate results stand behind its first register; the predicate at its end is an input.
"""
SPILLS = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", re.S
)


def disassembler() -> Path | None:
    """cuobjdump: of the toolkit, else the one that Triton carries."""
    if found := shutil.which("cuobjdump"):
        return Path(found)
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


def compiled(arch: str, source: Path, folder: Path) -> tuple[Path, str]:
    """The object of one architecture, and what ptxas says of it."""
    made = folder / f"{source.stem}_{arch}.o"
    command = [NVCC, "-std=c++17", "-O3", f"-I{CSRC / 'include'}", "-Xptxas", "-v"]
    command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-c", source, "-o", made]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made, done.stderr


def disassembled(made: Path) -> str:
    tool = disassembler()
    if tool is None:
        pytest.skip("no disassembler is here")
    shown = subprocess.run([tool, "-sass", made], capture_output=True, text=True, check=True)
    return shown.stdout


def fused_comparisons(sass: str) -> list[str]:
    """Every instruction that takes a comparison from a minimum or a maximum, with its kernel."""
    found, kernel = [], ""
    for line in sass.splitlines():
        if "Function :" in line:
            kernel = line.split(":", 1)[1].strip()
        elif match := FUSED.search(line):
            found.append(f"{match[0]} in {kernel}")
    return found


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel(arch: str, tmp_path: Path) -> None:
    source = CSRC / "cuda" / "delta_append.cu"
    num_compiled = 42
    if arch != HOPPER and "STATEFUL_ALL_KERNELS" not in os.environ:
        text, num_left_out = OTHER_HEAD_SIZES.subn("", source.read_text())
        assert num_left_out == 2
        source = tmp_path / source.name
        source.write_text(text)
        num_compiled = 14
    made, said = compiled(arch, source, tmp_path)
    assert "warning" not in said
    spills = {name: (int(stores), int(loads)) for name, stores, loads in SPILLS.findall(said)}
    kernels = {name for name in spills if "Li128E" in name}  # of head size 128
    assert len(kernels) == 14  # A: 3 tiles of bfloat16, half, and fp8 to each; B: 2
    for name in kernels:
        if "Fp8" not in name or arch == HOPPER:
            assert spills[name] == (0, 0), name
    sass = disassembled(made)
    assert sass.count("Function :") == len(spills) == num_compiled
    assert not fused_comparisons(sass)
    if arch == HOPPER:
        assert "HGMMA.64x128x16.F32.BF16" in sass
        assert "UTMALDG.4D" in sass
        assert "USETMAXREG" in sass
        assert "F2FP.F16.E4M3.UNPACK_B" in sass  # fp8 to half by an instruction of its own


CLAMPED = """
__global__ void clamped(const int* in, int* out) {
  const int n = max(min(in[threadIdx.x], 64), 0);
  out[threadIdx.x] = n == 64 ? 7 : n;
}
"""  # as the kernels had it until they ran on a device


@needs_nvcc
def test_the_mistake_of_ptxas_is_seen(tmp_path: Path) -> None:
    """By the versions that make it; 13.4 mended it (csrc/ptxas-vimnmx.md)."""
    source = tmp_path / "clamped.cu"
    source.write_text(CLAMPED)
    made, _ = compiled(HOPPER, source, tmp_path)
    said = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release (\d+)\.(\d+)", said.stdout)
    assert release is not None
    is_mended = (int(release[1]), int(release[2])) >= (13, 4)
    assert bool(fused_comparisons(disassembled(made))) != is_mended


def test_which_instructions_are_refused() -> None:
    fused = ["VIMNMX.RELU R56, P1, P1, R56, 0x40, PT ;", "VIMNMX R3, P0, PT, R2, 0x40, PT ;"]
    plain = [
        "VIMNMX R3, PT, PT, R2, 0x40, PT ;",
        "FMNMX R1, R2, R3, !PT ;",
        "@P0 VIMNMX R1, R2, 4, P1 ;",
    ]
    assert all(map(fused_comparisons, fused))
    assert not any(map(fused_comparisons, plain))


def test_without_a_device_a_call_says_why() -> None:
    reason = ops.why_unavailable()
    if not reason:
        pytest.skip("a device is here")
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        ops.num_ctas(torch.bfloat16, 128, 64, 0)
