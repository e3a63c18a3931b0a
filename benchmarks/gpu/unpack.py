# SPDX-License-Identifier: Apache-2.0
"""Unpack what pack_vllm.py made. `unpack.sh` calls it; Python's standard library is all it needs.

    python unpack.py PACK SITE

A finished SITE has a stamp: a second call for the same PACK does nothing.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS, SOURCES = "kernels", "sources.sha256"
LIBRARY = "vllm_stateful/_C.abi3.so"
STAMP = ".unpacked"
UNFINISHED = "unfinished"


class UnpackError(RuntimeError):
    """Something of the pack cannot be used here; the text says what to do."""


def digest(files: list[Path], root: Path) -> str:
    """Of names and contents."""
    of_all = hashlib.sha256()
    for file in sorted(files):
        of_all.update(f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode())
        of_all.update(file.read_bytes())
    return of_all.hexdigest()


def digest_of_sources(root: Path = ROOT) -> str:
    """Of what our CUDA library is compiled from."""
    files = [*root.glob("csrc/include/**/*.cuh"), *root.glob("csrc/cuda/*.cu")]
    return digest([*files, root / "csrc" / "bindings.cpp", root / "CMakeLists.txt"], root)


def unpack(pack: Path, site: Path, root: Path = ROOT) -> bool:
    """Everything into its place; whether there was anything to do.

    Raises:
        UnpackError: why not.
    """
    put_kernels(pack, root)
    files = [file for part in ("wheels", "site") for file in (pack / part).rglob("*")]
    files = [file for file in files if file.is_file()]
    if not files:
        raise UnpackError(f"{pack} is not a pack: neither wheels nor vLLM is in it")
    wanted, stamp = digest(files, pack), site / STAMP
    if stamp.is_file() and stamp.read_text() == wanted:
        return False
    if site.is_dir() and any(site.iterdir()):
        if not stamp.is_file():
            raise UnpackError(f"{site} holds something else; name another folder as SITE")
        shutil.rmtree(site)
    site.mkdir(parents=True, exist_ok=True)
    stamp.write_text(UNFINISHED)
    tasks: list[Callable[[], None]] = [lambda: _install(sorted(pack.glob("wheels/*.whl")), site)]
    for file in sorted(pack.rglob("site/**/*.xz")):
        place = site / file.relative_to(pack / "site").with_suffix("")
        if file.name.endswith(".tar.xz"):
            tasks.append(lambda file=file: _extract(file, site))  # type: ignore[misc]
        else:
            tasks.append(lambda file=file, place=place: _decompress(file, place))  # type: ignore[misc]
    with ThreadPoolExecutor(len(tasks)) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()
    stamp.write_text(wanted)
    return True


def put_kernels(pack: Path, root: Path) -> None:
    """Our library into the checkout, where `vllm_stateful.attention.libraries` looks for it.

    Raises:
        UnpackError: it was built from other sources. `ANY_KERNELS=1` takes it all the same.
    """
    packed = pack / KERNELS / Path(LIBRARY).name
    if not packed.is_file():
        return
    is_ours = (pack / KERNELS / SOURCES).read_text() == digest_of_sources(root)
    if not is_ours and not os.environ.get("ANY_KERNELS"):
        raise UnpackError(
            "the packed kernels were built from other sources than this checkout's csrc: "
            "pack again, or set ANY_KERNELS=1"
        )
    library = root / LIBRARY
    if library.is_file() and library.read_bytes() == packed.read_bytes():
        return
    fresh = library.with_suffix(f".{os.getpid()}")
    shutil.copy(packed, fresh)
    fresh.replace(library)


def _install(wheels: list[Path], site: Path) -> None:
    if not wheels:
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    command += ["--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--root-user-action=ignore", "--target", str(site), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnpackError(f"pip could not install the wheels: {done.stderr[-2000:]}")


def _extract(file: Path, site: Path) -> None:
    with tarfile.open(file, "r:xz") as tar:
        tar.extractall(site, filter="data")


def _decompress(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(file) as packed, place.open("wb") as out:
        shutil.copyfileobj(packed, out, 1 << 22)


def main() -> int:
    """Unpack, or say why not."""
    pack, site = map(Path, sys.argv[1:])
    try:
        is_new = unpack(pack, site)
    except (UnpackError, OSError, lzma.LZMAError, tarfile.TarError) as error:
        print(f"unpack: {error}", file=sys.stderr)
        return 1
    print(f"unpack: {'made' if is_new else 'found'} {site}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
