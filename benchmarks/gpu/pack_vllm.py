# SPDX-License-Identifier: Apache-2.0
"""Pack what a machine with a GPU and no network needs to run vLLM 0.32.0 beside this checkout.

    python -m benchmarks.gpu.pack_vllm OUT [--arch 90] [--python 3.12]

The machine has Python, torch 2.10 or later for CUDA, triton and transformers; vLLM pins a newer
torch, yet its extensions that are packed use torch's stable ABI. OUT holds about 50 MiB then: the
wheels of `offline.txt`, vLLM's Python files, and two of its extensions, of which the images of one
architecture are kept.
`PACK=OUT benchmarks/gpu/run.sh` unpacks and uses it there.

Needs pip, a few minutes and 2 GB of scratch disk. Nothing of it is kept but OUT.
"""

from __future__ import annotations

import argparse
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.fatbins import keep_one_arch

VLLM = "vllm==0.32.0"
WHEELS = Path(__file__).with_name("offline.txt")
GLIBC = (39, 35, 34, 31, 28, 27, 26, 24, 17, 5)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
EXTENSIONS = {  # which hold images of several architectures
    "vllm/_C_stable_libtorch.abi3.so": True,
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": False,
}
TEXT = (".py", ".json", ".jinja", ".typed", ".txt")
UNUSED = (
    "vllm/third_party/deep_gemm/",
    "vllm/third_party/fmha_sm100/",
    "vllm/entrypoints/serve/instrumentator/static/",
)
COMPRESSION = 6


def download(to: Path, python: str, arguments: Sequence[str]) -> None:
    """Wheels for that Python, without their dependencies.

    Raises:
        subprocess.CalledProcessError: pip found one of them nowhere.
    """
    platforms = [part for each in PLATFORMS for part in ("--platform", each)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    subprocess.run([*command, *platforms, "--dest", str(to), *arguments], check=True)


def is_needed(name: str) -> bool:
    """Whether a file of vLLM's wheel is one that Python reads."""
    is_text = name.endswith(TEXT) or ".dist-info/" in name
    return is_text and not name.endswith("/") and not name.startswith(UNUSED)


def pack_wheel(wheel: Path, out: Path, arch: int) -> None:
    """vLLM's Python files as `vllm_py.tar.xz`, its extensions as `NAME.xz`.

    Raises:
        ValueError: an extension has no machine code for this architecture.
    """
    with zipfile.ZipFile(wheel) as files:
        for name, has_others in EXTENSIONS.items():
            data = bytearray(files.read(name))
            if has_others:
                dropped = keep_one_arch(data, arch)
                print(f"{name}: {dropped / 1e6:.0f} MB of other architectures dropped", flush=True)
            packed = lzma.compress(bytes(data), preset=COMPRESSION)
            (out / f"{Path(name).name}.xz").write_bytes(packed)
        with tarfile.open(out / "vllm_py.tar.xz", "w:xz", preset=COMPRESSION) as tar:
            for info in files.infolist():
                if is_needed(info.filename):
                    member = tarfile.TarInfo(info.filename)
                    member.size = info.file_size
                    with files.open(info) as content:
                        tar.addfile(member, content)


def main() -> int:
    """Pack, and say how much it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", type=int, default=90, help="compute capability (%(default)s)")
    parser.add_argument("--python", default="3.12", help="of that machine (%(default)s)")
    args = parser.parse_args()
    wheels = args.out / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    download(wheels, args.python, ["--requirement", str(WHEELS)])
    with tempfile.TemporaryDirectory() as scratch:
        download(Path(scratch), args.python, [VLLM])
        (wheel,) = Path(scratch).glob("vllm-*.whl")
        pack_wheel(wheel, args.out, args.arch)
    total = sum(each.stat().st_size for each in args.out.rglob("*") if each.is_file())
    print(f"{args.out}: {total / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
