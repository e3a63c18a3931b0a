# SPDX-License-Identifier: Apache-2.0
"""Checks what the adapters use of vLLM beside the patched members.

These are classes that they extend, methods that they override, and functions and attributes that
they use. Python checks none of this: if vLLM adds a parameter to a method that we override, or
removes an attribute, the engine fails when it gets there. So each member is listed with the feature
that needs it, and its shape in each series of vLLM is recorded in ``v*/shapes.json`` (`shapes`). A
member that has drifted turns its feature off.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_stateful.compat import probe, used_by_api, used_by_doctor, used_by_engine, used_by_worker
from vllm_stateful.compat.patch import CompatError, Process, UseDriftError
from vllm_stateful.compat.shapes import Live, Reader
from vllm_stateful.compat.use import Use

GONE = "gone"

FIRST = "0.32"
"""The series whose shapes are recorded in full."""

USES = (
    *used_by_api.USES,
    *used_by_engine.USES,
    *used_by_worker.USES,
    *used_by_doctor.USES,
)

NEEDS: Mapping[str, tuple[str, ...]] = {
    "endpoint": ("sessions", "transport", "requests"),
    "messages": ("sessions",),
    "offload": ("sessions",),
    "renderer": ("sessions",),
    "responses": ("sessions", "transport"),
    "transport": ("sessions",),
    "worker-ids": ("sessions",),
    "device-drafts": ("sessions", "worker-ids"),
    "detokenize": ("sessions",),
    "tool-call-check": ("sessions",),
    "doctor": ("sessions", "renderer"),
}
"""For each feature, the features whose code it imports. If one of those is off, it is off, too."""


@dataclass(frozen=True)
class Drift:
    """One member that is not as recorded."""

    use: Use
    name: str
    expected: str
    found: str

    def __str__(self) -> str:
        separator = "." if ":" in self.use.owner else ":"
        return f"{self.use.owner}{separator}{self.name} {self.difference}"

    @property
    def difference(self) -> str:
        """The difference in words."""
        if self.found == GONE:
            return "does not exist"
        return f"is {self.found}, expected {self.expected}"


def drifts(uses: Iterable[Use], series: str, reader: Reader) -> Iterator[Drift]:
    """Yield all members that are not as recorded for a series, for example ``0.32``."""
    recorded = shapes_of(series)
    for use in uses:
        for name in use.members:
            expected = recorded[use.owner][name]
            found = reader.shape(use.owner, name)
            if found != expected:
                yield Drift(use, name, expected, GONE if found is None else found)
        for name in use.overrides.split():
            if name.startswith("__"):  # a special method: its callers do not name it
                continue
            if not any(reader.mentions(caller, name) for caller in use.asked_by.split()):
                yield Drift(use, name, "asked for by " + use.asked_by, "asked for by nobody")


@functools.cache
def check(feature: str, processes: frozenset[Process]) -> None:
    """Check that the installed vLLM has everything that a feature uses in some processes.

    Imports what is used. Only a success is remembered: a feature that does not fit is checked again
    at the next call.

    Raises:
        UseDriftError: a member is gone or has changed; the error names the first one.
        CompatError: vLLM is not installed, or its series is not supported.
    """
    version = probe.vllm_version()
    series = probe.series_of(version)
    if series is None:
        raise CompatError(str(probe.unsupported_reason(version)))
    features = (feature, *NEEDS.get(feature, ()))
    wanted = [use for use in USES if use.feature in features and use.process in processes]
    found = list(drifts(wanted, series, Live()))
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UseDriftError(f"vLLM {version}: {found[0]}{more}")


def record(reader: Reader) -> dict[str, dict[str, str]]:
    """The shapes of all members that are used, by owner and name.

    Raises:
        LookupError: a member does not exist.
    """
    made: dict[str, dict[str, str]] = {}
    for use in USES:
        for name in use.members:
            shape = reader.shape(use.owner, name)
            if shape is None:
                raise LookupError(f"{use.owner} has no {name}")
            made.setdefault(use.owner, {})[name] = shape
    return made


@functools.cache
def shapes_of(series: str) -> dict[str, dict[str, str]]:
    """The recorded shapes of a series: those of the first series, with this one's changes."""
    folder = Path(__file__).parent
    made: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys((FIRST, series)):
        path = folder / f"v{name.replace('.', '_')}" / "shapes.json"
        for owner, members in json.loads(path.read_text()).items():
            made.setdefault(owner, {}).update(members)
    return made
