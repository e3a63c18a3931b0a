# SPDX-License-Identifier: Apache-2.0
"""What adapters use of vLLM beside what is patched: classes that they extend, methods that they
override, functions and attributes that they ask for.

Nothing here is checked by Python: an override whose original got a parameter ends the engine, and
an attribute that is gone ends it later. So each stands here with the feature that needs it, and its
shape in each series of vLLM stands in ``v*/shapes.json`` (`shapes`). What has drifted
turns its feature off.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_stateful.compat import probe, used_by_api, used_by_engine, used_by_worker
from vllm_stateful.compat.patch import CompatError, Process, UseDriftError
from vllm_stateful.compat.shapes import Live, Reader
from vllm_stateful.compat.use import Use

GONE = "gone"

FIRST = "0.32"
"""The series whose shapes are recorded in full."""

USES = (*used_by_api.USES, *used_by_engine.USES, *used_by_worker.USES)

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
}
"""By feature, those whose code its own code imports: it is off with them."""


@dataclass(frozen=True)
class Drift:
    """One member that is not what it was."""

    use: Use
    name: str
    expected: str
    found: str

    def __str__(self) -> str:
        separator = "." if ":" in self.use.owner else ":"
        return f"{self.use.owner}{separator}{self.name} {self.difference}"

    @property
    def difference(self) -> str:
        """What is other, in words."""
        if self.found == GONE:
            return "does not exist"
        return f"is {self.found}, expected {self.expected}"


def drifts(uses: Iterable[Use], series: str, reader: Reader) -> Iterator[Drift]:
    """What is not as it is recorded for a series, for example ``0.32``."""
    recorded = shapes_of(series)
    for use in uses:
        for name in use.members:
            expected = recorded[use.owner][name]
            found = reader.shape(use.owner, name)
            if found != expected:
                yield Drift(use, name, expected, GONE if found is None else found)
        for name in use.overrides.split():
            if name.startswith("__"):  # called without its name
                continue
            if not any(reader.mentions(caller, name) for caller in use.asked_by.split()):
                yield Drift(use, name, "asked for by " + use.asked_by, "asked for by nobody")


@functools.cache
def check(feature: str, processes: frozenset[Process]) -> None:
    """See whether all that a feature uses in some processes is as the installed vLLM has it.

    Imports what is used. A feature that does not fit is looked at again at the next call.

    Raises:
        UseDriftError: something is gone or other; the first one is named.
        CompatError: vLLM is not installed, or of no supported series.
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
    """The shapes of all that is used, by owner and name.

    Raises:
        LookupError: something is not there.
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
    """The recorded shapes of a series: those of the first, and what is other in this one."""
    folder = Path(__file__).parent
    made: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys((FIRST, series)):
        path = folder / f"v{name.replace('.', '_')}" / "shapes.json"
        for owner, members in json.loads(path.read_text()).items():
            made.setdefault(owner, {}).update(members)
    return made
