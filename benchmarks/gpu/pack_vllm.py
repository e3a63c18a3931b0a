# SPDX-License-Identifier: Apache-2.0
"""Pack what a machine with a GPU and no network needs to run vLLM 0.32.0 beside this checkout.

    python -m benchmarks.gpu.pack_vllm OUT [--kernels] [--traces FILE ...] [--arch 90]

The machine has Python, torch 2.10 or later for CUDA, triton and transformers; vLLM pins a newer
torch, yet its extensions that are packed use torch's stable ABI. OUT holds then

    wheels/      those of `offline.txt`
    site/        vLLM: its Python files, and its extensions, with the images of one architecture
    kernels/     our own library for that architecture (--kernels: nvcc and cmake build it)
    replay/      a tokenizer and recorded traces, for what talks to a server

`PACK=OUT benchmarks/gpu/run.sh` unpacks and uses it there; `benchmarks/gpu/rehearse.sh` packs it
and finds out whether anything is missing.

Needs pip, a few minutes and 2 GB of scratch disk. vLLM's part is packed once: a second call into
the same OUT does the rest again.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.fatbins import keep_one_arch
from benchmarks.gpu.unpack import KERNELS, LIBRARY, ROOT, SOURCES, digest_of_sources

VLLM = "vllm==0.32.0"
WHEELS = Path(__file__).with_name("offline.txt")
TOKENIZER = ROOT / ".cache" / "models" / "smollm2-135m"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
GLIBC = (39, 35, 34, 31, 28, 27, 26, 24, 17, 5)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
EXTENSIONS = {  # which hold images of several architectures
    "vllm/_C_stable_libtorch.abi3.so": True,
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": False,
    "vllm/cumem_allocator.abi3.so": False,
    "vllm/fs_io_C.abi3.so": False,
    "vllm/spinloop.abi3.so": False,
}
MOE = {"vllm/_moe_C_stable_libtorch.abi3.so": True}
TEXT = (".py", ".json", ".jinja", ".typed", ".txt")
UNUSED = (
    "vllm/third_party/deep_gemm/",
    "vllm/third_party/fmha_sm100/",
    "vllm/entrypoints/serve/instrumentator/static/",
)
COMPRESSION = 6
STAMP = "vllm.json"  # which of vLLM's is packed


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


def pack_wheel(wheel: Path, site: Path, arch: int, extensions: dict[str, bool]) -> None:
    """vLLM's Python files as `vllm.tar.xz`, its extensions as `PATH.xz`.

    Raises:
        ValueError: an extension has no machine code for this architecture.
    """
    with zipfile.ZipFile(wheel) as files:
        for name, has_others in extensions.items():
            data = bytearray(files.read(name))
            if has_others:
                dropped = keep_one_arch(data, arch)
                print(f"{name}: {dropped / 1e6:.0f} MB of other architectures dropped", flush=True)
            packed = site / f"{name}.xz"
            packed.parent.mkdir(parents=True, exist_ok=True)
            packed.write_bytes(lzma.compress(data, preset=COMPRESSION))
        with tarfile.open(site / "vllm.tar.xz", "w:xz", preset=COMPRESSION) as tar:
            for info in files.infolist():
                if is_needed(info.filename):
                    member = tarfile.TarInfo(info.filename)
                    member.size = info.file_size
                    with files.open(info) as content:
                        tar.addfile(member, content)


def pack_vllm(out: Path, python: str, arch: int, wheel: Path | None, moe: bool) -> None:
    """vLLM's part, unless it is there."""
    extensions = EXTENSIONS | (MOE if moe else {})
    wanted = {"vllm": VLLM, "python": python, "arch": arch, "extensions": sorted(extensions)}
    stamp, site = out / STAMP, out / "site"
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return
    stamp.unlink(missing_ok=True)
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        if wheel is None:
            download(Path(scratch), python, [VLLM])
            (wheel,) = Path(scratch).glob("vllm-*.whl")
        pack_wheel(wheel, site, arch, extensions)
    stamp.write_text(json.dumps(wanted))


def pack_wheels(out: Path, python: str, requirements: Path) -> None:
    """Exactly the wheels of the list: two versions of one would end the installation."""
    wheels = out / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir()
    download(wheels, python, ["--requirement", str(requirements)])


def pack_kernels(out: Path, arch: str) -> None:
    """Build our library for one device, against the torch of this interpreter.

    Raises:
        subprocess.CalledProcessError: nvcc or cmake says why not.
    """
    kernels = out / KERNELS
    sources = digest_of_sources()
    stamp = kernels / SOURCES
    if stamp.is_file() and stamp.read_text() == sources:
        return
    shutil.rmtree(kernels, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        build, installed = f"{scratch}/build", f"{scratch}/installed"
        subprocess.run(
            [
                *("cmake", "-S", str(ROOT), "-B", build, "-DCMAKE_BUILD_TYPE=Release"),
                *("-DSTATEFUL_CUDA=on", f"-DSTATEFUL_CUDA_ARCHS={arch}", "-DSTATEFUL_CPU=off"),
                f"-DPython_EXECUTABLE={sys.executable}",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        log = Path(scratch, "build.log")
        with log.open("w") as file:
            built = subprocess.run(
                ["cmake", "--build", build], stdout=file, stderr=subprocess.STDOUT, check=False
            )
        if built.returncode:
            print(log.read_text()[-3000:], file=sys.stderr)
            built.check_returncode()
        subprocess.run(
            ["cmake", "--install", build, "--prefix", installed],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        kernels.mkdir()
        shutil.copy(Path(installed, LIBRARY), kernels)
    stamp.write_text(sources)


def pack_replay(out: Path, tokenizer: Path, traces: Sequence[Path]) -> None:
    """The tokenizer's files, where they are, and recorded traces.

    Raises:
        FileNotFoundError: a trace is not there.
    """
    replay = out / "replay"
    shutil.rmtree(replay, ignore_errors=True)
    replay.mkdir()
    present = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if not present:
        print("no tokenizer is packed: `make model` makes the small model", flush=True)
    for file in [*present, *traces]:
        shutil.copy(file, replay)


def total_bytes(folder: Path) -> int:
    """Of all files of a folder."""
    return sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())


def main() -> int:
    """Pack, and say how much it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", type=int, default=90, help="compute capability (%(default)s)")
    parser.add_argument("--python", default="3.12", help="of that machine (%(default)s)")
    parser.add_argument("--wheel", type=Path, help="vLLM's, where it was downloaded before")
    parser.add_argument("--moe", action="store_true", help="vLLM's kernels for experts too")
    parser.add_argument("--kernels", action="store_true", help="build our library into it")
    parser.add_argument("--traces", type=Path, nargs="+", default=[], help="*.jsonl into replay/")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pack_wheels(args.out, args.python, WHEELS)
    pack_vllm(args.out, args.python, args.arch, args.wheel, args.moe)
    if args.kernels:
        pack_kernels(args.out, f"{args.arch}a" if args.arch >= 90 else str(args.arch))
    pack_replay(args.out, TOKENIZER, args.traces)
    for part in sorted(each for each in args.out.iterdir() if each.is_dir()):
        print(f"{part.name}: {total_bytes(part) / 2**20:.1f} MiB")
    print(f"{args.out}: {total_bytes(args.out) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
