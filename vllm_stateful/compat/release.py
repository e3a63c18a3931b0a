# SPDX-License-Identifier: Apache-2.0
"""Compares a vLLM that is not installed with the one that this package was written for.

It is given as a folder that contains the package ``vllm``, as a wheel, or as a version whose wheel
pip downloads.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vllm_stateful.compat import probe, uses
from vllm_stateful.compat.patch import CompatError, Patch
from vllm_stateful.compat.shapes import ATTRIBUTE, CLASS, Source


class Line(NamedTuple):
    """The result for one member."""

    feature: str
    member: str
    verdict: str
    """``fits``, ``drifted`` or ``gone``."""
    difference: str = ""
    process: str = "all"


@contextmanager
def opened(named: str) -> Iterator[Path]:
    """Give the folder that contains the package. A temporary folder is removed afterwards.

    Args:
        named: a folder, a wheel or a version.

    Raises:
        CompatError: there is no such vLLM.
    """
    path = Path(named)
    if path.is_dir():
        if not (path / "vllm" / "__init__.py").is_file():
            raise CompatError(f"{named} does not hold the package vllm")
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = path if path.is_file() else _download(named, Path(folder))
        made = Path(folder) / "unpacked"
        try:
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if n.endswith((".py", "METADATA"))]
                archive.extractall(made, names)
        except zipfile.BadZipFile as error:
            raise CompatError(f"{named} is no wheel") from error
        yield made


def _download(version: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*pip, f"vllm=={version}"], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise CompatError(f"there is no folder, wheel or release {version!r}: {done.stderr[-300:]}")
    return wheels[0]


def version_in(root: Path) -> str:
    """The version of the vLLM in a folder; ``unknown`` if the folder does not tell."""
    for path in [*root.glob("vllm-*.dist-info/METADATA"), root / "vllm" / "_version.py"]:
        if path.is_file():
            found = re.search(r"(?:^Version: |__version__ = .*?')([\w.+]+)", path.read_text(), re.M)
            if found is not None:
                return found[1]
    return "unknown"


def compared(root: Path, patches: tuple[Patch, ...], series: str) -> list[Line]:
    """Compare all patched and used members with what is recorded for a series."""
    reader = Source(root)
    return [*_patched(reader, patches), *_used(reader, series)]


def _patched(reader: Source, patches: tuple[Patch, ...]) -> Iterator[Line]:
    for patch in patches:
        verdict, difference = _verdict(reader, patch)
        member = f"{patch.target} (patched)"
        yield Line(patch.feature, member, verdict, difference, patch.process)


def _verdict(reader: Source, patch: Patch) -> tuple[str, str]:
    owner, name = _parted(patch.target)
    found = reader.shape(owner, name)
    found = found if found in (None, ATTRIBUTE, CLASS) else str(found).partition(" -> ")[0]
    if patch.adds and found is not None:
        return "drifted", "exists already, it was to be added"
    if patch.adds:
        return ("fits" if reader.exists(owner) else "gone"), ""
    if found is None:
        return "gone", ""
    if found != patch.signature:
        return "drifted", f"{patch.signature} became {found}"
    return "fits", ""


def _parted(target: str) -> tuple[str, str]:
    """Split a patch's target into owner and member."""
    module, _, path = target.partition(":")
    owner, _, name = path.rpartition(".")
    return (f"{module}:{owner}" if owner else module), name


def _used(reader: Source, series: str) -> Iterator[Line]:
    drifted = {(d.use, d.name): d for d in uses.drifts(uses.USES, series, reader)}
    for use in uses.USES:
        for name in use.members:
            drift = drifted.get((use, name))
            member = f"{use.owner}{'.' if ':' in use.owner else ':'}{name}"
            verdict, difference = "fits", ""
            if drift is not None and drift.found == uses.GONE:
                verdict = "gone"
            elif drift is not None:
                verdict, difference = "drifted", f"{drift.expected} became {drift.found}"
            yield Line(use.feature, member, verdict, difference, use.process)


def nearest(version: str) -> str:
    """The supported series to compare a version with: its own, or the nearest one."""
    own = probe.series_of(version)
    if own is not None:
        return own
    known = [f"{major}.{minor}" for major, minor in probe.SUPPORTED]
    found = re.match(r"(\d+)\.(\d+)", version)
    is_older = found is not None and (int(found[1]), int(found[2])) < probe.SUPPORTED[0]
    return known[0] if is_older else known[-1]


def report(version: str, series: str, lines: list[Line], *, everything: bool = False) -> str:
    """A table for people of what does not fit, or of everything."""
    counts = {verdict: sum(line.verdict == verdict for line in lines) for verdict in VERDICTS}
    head = probe.unsupported_reason(version) or f"vLLM {version} is supported"
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    rows = [f"{head}.", f"Compared with what is used of vLLM {series}: {said}.", ""]
    for line in sorted(set(lines)):
        if everything or line.verdict != "fits":
            rows.append(f"{line.verdict:8} {line.feature:18} {line.member}")
            rows += [f"{'':27} {line.difference}"] if line.difference else []
    off = features_off(line for line in lines if line.verdict != "fits")
    if off:
        rows += ["", f"Features that would be off: {', '.join(off)}."]
    return "\n".join(rows).rstrip() + "\n"


def features_off(drifted: Iterable[Line]) -> list[str]:
    """The features whose code needs what does not fit."""
    changed = {line.feature for line in drifted}
    return sorted(changed | {name for name, needs in uses.NEEDS.items() if changed & set(needs)})


VERDICTS = ("fits", "drifted", "gone")
