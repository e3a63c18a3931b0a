# SPDX-License-Identifier: Apache-2.0
"""vLLM's backend with our kernels serves real turns: the launches alone are emulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from emulator import FEW, ROOT, build, cuda_headers
from forked import Forks, with_vllm

pytestmark = pytest.mark.skipif(cuda_headers() is None, reason="the CUDA headers are not here")
MOST_DIFFERENCE = (
    0.1  # of a log-probability in bfloat16, of random weights; each layer is held to 4e-3
)
V2 = Path(__file__).parents[1] / "model_runner_v2"
LAYERS = 2
AGENTS = 3
STRICT = {"VLLM_STATEFUL_STRICT": "1", "VLLM_STATEFUL_CHECK_INVARIANTS": "1"}


def played(folder: Path, kernel: str, *more: Path | str, **environment: str) -> dict[str, Any]:
    folder = folder / kernel
    folder.mkdir()
    # Model runner V2 needs an interpreter in the place of Triton's compiler before vLLM comes.
    on_host = Forks("on_host", "vllm.entrypoints.llm", path=(V2,)) if "v2" in more else None
    forks = on_host or with_vllm()
    environment["PYTHONPATH"] = str(ROOT)
    forks.run(Path(__file__).with_name("engine.py"), folder, kernel, *more, **environment)
    return dict(json.loads((folder / "answers.json").read_text()))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return played(tmp_path_factory.mktemp("stock"), "stock")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulator"), flags=FEW)


@pytest.mark.parametrize(
    ("kernel", "runner", "plugin"),
    [
        ("mma", (), {}),
        ("wgmma", (), {"VLLM_STATEFUL": "1", **STRICT}),
        ("mma", ("v2",), {"VLLM_STATEFUL": "1", **STRICT}),
    ],
)
def test_turns_through_the_backend(
    kernel: str,
    runner: tuple[str, ...],
    plugin: dict[str, str],
    stock: dict[str, Any],
    library: Path,
    tmp_path: Path,
) -> None:
    ours = played(tmp_path, kernel, library, *runner, **plugin)
    for (_, expected, cached), (_, logprob, cached_here) in zip(
        stock["answers"], ours["answers"], strict=False
    ):
        assert abs(logprob - expected) < MOST_DIFFERENCE
        assert cached_here == cached if not plugin else cached_here >= cached
    steps = ours["steps"]["taken"]
    assert set(ours["steps"]) == {"taken"}
    assert sum(ours["calls"].values()) == LAYERS * steps
    if kernel == "mma":  # and with prompts of which one hits what a step computes
        assert 0 < ours["writes"] < LAYERS * steps / 2
    most = max(map(int, ours["groups"]), default=0)
    assert most == (AGENTS if runner and plugin else 0), "only model runner V2 knows who shares"


def test_turns_over_a_cache_in_fp8(stock: dict[str, Any], library: Path, tmp_path: Path) -> None:
    """Each layer is compared with float64 while it is played; the model's answers are others."""
    ours = played(tmp_path, "fp8", library, VLLM_STATEFUL="1", **STRICT)
    for (*_, cached), (*_, cached_here) in zip(stock["answers"], ours["answers"], strict=False):
        assert cached_here >= cached
    assert set(ours["steps"]) == {"taken"}
    assert sum(ours["calls"].values()) == LAYERS * ours["steps"]["taken"]
