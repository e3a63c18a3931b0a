# SPDX-License-Identifier: Apache-2.0
"""The compiled library: loads without a device, says what is missing, and has a fake.

Built by `cmake --install build/cuda --prefix .` (csrc/README.md); without it these tests skip.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from cases import arguments
from emulator import CSRC
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_stateful.attention import ops

built = pytest.mark.skipif(not ops.LIBRARY.exists(), reason="_C.abi3.so is not built")
NEEDED = {"libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1"}
NEEDED |= {"libc.so.6", "ld-linux-x86-64.so.2"}


def test_the_bindings_are_valid_against_this_torch() -> None:
    includes = Path(torch.__file__).parent / "include"
    command = ["g++", "-std=c++17", "-fsyntax-only", "-DUSE_CUDA", f"-I{CSRC / 'include'}"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(includes)]
    cuda = Path("/usr/local/cuda/include")
    if not (cuda / "cuda_bf16.h").exists():
        pytest.skip("the CUDA headers are not here")
    command += ["-isystem", str(cuda), str(CSRC / "bindings.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@built
def test_it_loads_where_there_is_no_device() -> None:
    assert ops.why_unavailable() in ("", "no CUDA device is here")
    assert torch.ops.vllm_stateful.num_devices() == torch.cuda.device_count()


@built
def test_it_needs_nothing_of_cuda() -> None:
    shown = subprocess.run(
        ["readelf", "-d", str(ops.LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    needed = {line.split("[")[1].rstrip("]") for line in shown.splitlines() if "NEEDED" in line}
    assert needed <= NEEDED


@built
def test_tensors_on_the_host_are_refused() -> None:
    ops.why_unavailable()
    with pytest.raises(NotImplementedError, match="CPU"):
        torch.ops.vllm_stateful.delta_append_attention(*arguments("cpu"))


@built
def test_it_can_be_traced_and_its_schema_is_true() -> None:
    ops.why_unavailable()
    op = torch.ops.vllm_stateful.delta_append_attention
    with FakeTensorMode():
        assert op(*arguments("cuda")) is None
    mutated = {each.name for each in op.default._schema.arguments if each.is_write}
    assert mutated == {"cache", "out", "partial_out", "partial_lse", "arrivals"}
    if torch.cuda.is_available():
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(op.default, tuple(arguments("cuda")), test_utils=checks)
