# SPDX-License-Identifier: Apache-2.0
"""`rehearse.sh quick`: what this environment alone can tell of a run on a machine with a GPU."""

from __future__ import annotations

import lzma
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu.limited import append_row
from benchmarks.gpu.pack_vllm import is_needed
from benchmarks.gpu.rehearsal import check, imports, stubs, summary
from benchmarks.gpu.rehearsal.imports import Statement
from benchmarks.gpu.unpack import UnpackError, digest_of_sources, unpack

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "gpu"
OWN = ("vllm_stateful", "benchmarks.gpu", "benchmarks.kernels", "benchmarks.models")
ONLY_THERE = ("vllm.vllm_flash_attn.", "vllm.third_party.")  # not in a build for CPUs
FROM_TESTS = {"cases"}  # tests/kernels/cases.py, which check_kernels puts on the path
OTHERS_NAMES = {"cuda": "cuda-bindings", "pynvml": "nvidia-ml-py"}


def listed() -> set[str]:
    """The distributions that are there: the machine's, and those that are packed."""
    lines = [
        line.partition("#")[0]
        for file in (GPU / "rehearsal" / "machine.txt", GPU / "offline.txt")
        for line in file.read_text().splitlines()
    ]
    return {re.split(r"[=<>\[]", line.strip())[0] for line in lines if line.strip()}


def has_top(distributions: set[str]) -> Callable[[str], bool]:
    """Whether a package would be found there."""
    of_package = packages_distributions()

    def found(top: str) -> bool:
        owners = [*of_package.get(top, ()), OTHERS_NAMES.get(top, top)]
        return top in sys.stdlib_module_names or any(
            canonicalize_name(name) in distributions for name in owners
        )

    return found


def roots() -> list[str]:
    """What a run imports: the modules named by check.py, and every file of ours."""
    files = [
        file.relative_to(ROOT).with_suffix("")
        for package in OWN
        for file in ROOT.joinpath(*package.split(".")).rglob("*.py")
    ]
    own = [".".join(file.parts).removesuffix(".__init__") for file in files]
    return [*check.MODULES, *own]


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    return imports.closure(roots())


def lacks(loaded: set[str], distributions: set[str]) -> dict[str, Statement]:
    may_be_missing = imports.allowed()
    found = imports.missing(loaded, has_top(distributions), look_up_names=False)
    return {
        name: each
        for name, each in found.items()
        if not check.is_allowed(name, may_be_missing)
        and not name.startswith(ONLY_THERE)
        and name not in FROM_TESTS
    }


def test_every_import_is_of_something_that_is_there(loaded: set[str]) -> None:
    assert len(loaded) > 700
    assert lacks(loaded, listed()) == {}


@pytest.mark.parametrize("name", ["blake3", "openai", "transformers"])
def test_one_that_was_not_packed_is_named(name: str, loaded: set[str]) -> None:
    assert list(lacks(loaded, listed() - {name})) == [name]


def unmet(distributions: set[str]) -> set[str]:
    """What the packed wheels ask for and nobody has, as far as they are installed here."""
    found = set()
    for line in (GPU / "offline.txt").read_text().splitlines():
        try:
            asked = [Requirement(text) for text in requires(line.partition("==")[0]) or ()]
        except PackageNotFoundError:
            continue
        needed = [each for each in asked if not each.marker or each.marker.evaluate({"extra": ""})]
        found |= {canonicalize_name(each.name) for each in needed} - distributions
    return found


def test_what_packed_packages_ask_for_is_there_too() -> None:
    assert unmet(listed()) == set()
    assert unmet(listed() - {"jmespath"}) == {"jmespath"}


def test_lists_hold_each_once_and_in_order() -> None:
    for file in (GPU / "offline.txt", GPU / "rehearsal" / "machine.txt"):
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        names = [re.split(r"[=<>]", line)[0] for line in lines]
        assert names == sorted(set(names))
    allowed = (GPU / "rehearsal" / "allowed.txt").read_text().splitlines()[1:]
    assert allowed == sorted(allowed)
    assert all(imports.allowed().values())


def test_only_imports_that_must_succeed_are_read() -> None:
    source = """
import a
from . import b
try:
    import c
except ImportError:
    import d
try:
    import e
except KeyError:
    pass
with suppress(ImportError):
    import f
if TYPE_CHECKING:
    import g
def lazy():
    from ..h import i
"""
    found = list(imports.statements(source, "p.q.r", is_package=False))
    assert [(each.module, each.name) for each in found] == [
        ("a", ""),
        ("p.q", "b"),
        ("d", ""),
        ("e", ""),
        ("p.h", "i"),
    ]
    assert [each.is_lazy for each in found] == [False] * 4 + [True]


def test_the_pack_holds_what_python_reads() -> None:
    assert is_needed("vllm/envs.py")
    assert is_needed("vllm-0.32.0.dist-info/METADATA")
    assert not is_needed("vllm/_C_stable_libtorch.abi3.so")
    assert not is_needed("vllm/third_party/deep_gemm/include/a.cuh")


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    folder = tmp_path / "pack"
    (folder / "site" / "vllm").mkdir(parents=True)
    (folder / "site" / "vllm" / "_C.so.xz").write_bytes(lzma.compress(b"machine code"))
    return folder


def test_unpacking_again_finds_what_was_made(pack: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert unpack(pack, site)
    assert (site / "vllm" / "_C.so").read_bytes() == b"machine code"
    assert not unpack(pack, site)
    (site / ".unpacked").write_text("unfinished")
    assert unpack(pack, site)


def test_unpacking_destroys_nothing_of_others(pack: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "thesis.tex").touch()
    with pytest.raises(UnpackError, match="something else"):
        unpack(pack, site)
    with pytest.raises(UnpackError, match="is not a pack"):
        unpack(tmp_path / "nothing", site)


def test_kernels_of_other_sources_are_refused(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    for name in ("csrc/bindings.cpp", "csrc/cuda/a.cu", "CMakeLists.txt"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    (checkout / "vllm_stateful").mkdir()
    (pack / "kernels").mkdir()
    (pack / "kernels" / "_C.abi3.so").write_bytes(b"ours")
    (pack / "kernels" / "sources.sha256").write_text(digest_of_sources(checkout))
    unpack(pack, tmp_path / "site", checkout)
    assert (checkout / "vllm_stateful" / "_C.abi3.so").read_bytes() == b"ours"
    (checkout / "csrc" / "bindings.cpp").write_text("changed")
    with pytest.raises(UnpackError, match="other sources"):
        unpack(pack, tmp_path / "site", checkout)
    monkeypatch.setenv("ANY_KERNELS", "1")
    unpack(pack, tmp_path / "site", checkout)


@pytest.mark.parametrize(
    ("problem", "size", "status"), [("", 1, 0), ("missing", 1, 1), ("", 65 << 20, 1)]
)
def test_the_summary_fails_on_findings_and_size(
    problem: str, size: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    append_row(rows, {"part": "imports", "what": "vllm", "problem": problem})
    command = ["summary", str(rows), "--bytes", str(size), "--limit", "64"]
    monkeypatch.setattr("sys.argv", command)
    assert summary.main() == status


def test_the_stubs_compile_and_answer(tmp_path: Path) -> None:
    stubs.build(tmp_path, [])
    program = (
        "import ctypes; nvml, cuda = map(ctypes.CDLL, ('libnvidia-ml.so.1', 'libcuda.so.1'));"
        "count = ctypes.c_int(); assert nvml.nvmlInit() == 0;"
        "assert nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0;"
        "print(count.value, cuda.cuInit(0))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.split()[0] == "1"
    assert said.split()[1] != "0"
