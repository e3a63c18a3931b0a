# SPDX-License-Identifier: Apache-2.0
"""Where and with what a result was measured: without it a figure means nothing."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


def describe() -> dict[str, str]:
    """Machine, versions, commit and date, as short texts."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return {
        "machine": f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB",
        "python": platform.python_version(),
        "vllm": _version("vllm"),
        "vllm_stateful": _version("vllm-stateful"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Short hash of the checkout, marked when files differ; without git what COMMIT says."""
    head = _git("rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("COMMIT") or "none"
    return f"{head} with changes" if _git("status", "--porcelain") else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
