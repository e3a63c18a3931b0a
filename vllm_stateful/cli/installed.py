# SPDX-License-Identifier: Apache-2.0
"""Finds what is installed here and whether it fits, without importing vLLM."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from vllm_stateful import __version__
from vllm_stateful.cli.findings import Finding, Mark
from vllm_stateful.compat import ledger, probe, release
from vllm_stateful.compat.patch import CompatError

PLUGIN = "stateful"
_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")
_PROCESSES = {"api": "API server", "engine": "engine core", "worker": "worker"}
_ASIDE = ("attention-cpu", "attention-cuda", "doctor")
"""Features without which a server keeps sessions: the kernels of one platform, and this command."""


def versions() -> Finding:
    """The versions that are installed, and whether vLLM's is supported."""
    try:
        vllm = probe.vllm_version()
        reason = probe.unsupported_reason(vllm)
    except CompatError as error:
        vllm, reason = None, str(error)
    facts = {
        "vllm_stateful": __version__,
        "vllm": vllm,
        "torch": _version("torch"),
        "python": platform.python_version(),
    }
    text = ", ".join(f"{name} {found}" for name, found in facts.items() if found is not None)
    if reason is not None:
        return Finding("versions", "off", f"{text}; {reason}", facts)
    return Finding(
        "versions", "ok", text.replace(f"vllm {vllm}", f"vllm {vllm} (supported)"), facts
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def entry_points(environ: Mapping[str, str] = os.environ) -> Finding:
    """Whether vLLM finds the plugin."""
    missing = [g for g in _GROUPS if PLUGIN not in metadata.entry_points(group=g).names]
    if missing:
        text = f"vLLM does not find {missing[0]}: install vllm_stateful in vLLM's environment"
        return Finding("entry points", "off", text)
    named = environ.get("VLLM_PLUGINS")
    if named is not None and PLUGIN not in named.split(","):
        text = f"VLLM_PLUGINS={named!r} leaves the plugin out: add {PLUGIN!r} to it"
        return Finding("entry points", "off", text)
    return Finding("entry points", "ok", "vLLM finds the plugin")


def fit(version: str) -> Iterator[Finding]:
    """What of the installed vLLM fits, and what is off in which process if not all does."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        yield Finding("fit", "off", "the package vllm cannot be found")
        return
    root = Path(spec.origin).parents[1]
    lines = release.compared(root, ledger.PATCHES, release.nearest(version))
    drifted = [line for line in lines if line.verdict != "fits"]
    num, mark = len(lines) - len(drifted), _worst(drifted)
    text = f"{num} of {len(lines)} patches and uses fit vLLM {version}"
    yield Finding("fit", mark, text, {"fits": num, "drifted": len(drifted)})
    for process, name in _PROCESSES.items():
        here = [line for line in drifted if line.process in (process, "all")]
        if here:
            features = release.features_off(here)
            text = f"off in the {name}: {', '.join(features)}: {_first(here)}"
            yield Finding("fit", _worst(here), text, {"process": process, "features": features})


def _worst(drifted: list[release.Line]) -> Mark:
    if not drifted:
        return "ok"
    return "warn" if all(line.feature in _ASIDE for line in drifted) else "off"


def _first(drifted: list[release.Line]) -> str:
    line = drifted[0]
    more = f" (and {len(drifted) - 1} more)" if len(drifted) > 1 else ""
    return f"{line.member} {line.difference or 'is gone'}{more}"
