# SPDX-License-Identifier: Apache-2.0
"""The findings of a check: lines with a mark, as text or as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Mark = Literal["ok", "off", "warn"]

WIDTH = 100
_INDENT = 18


@dataclass(frozen=True)
class Finding:
    """One finding, which is one line.

    Attributes:
        section: what was looked at.
        mark: ``ok``; ``warn``: slower, or not known; ``off``: left to stock vLLM.
        text: what was found.
        facts: the finding for programs, where there is more to say than the text says.
    """

    section: str
    mark: Mark
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def as_text(findings: Iterable[Finding]) -> str:
    """The findings as a table for people."""
    return "".join(_line(finding) + "\n" for finding in findings)


def _line(finding: Finding) -> str:
    return textwrap.fill(
        finding.text,
        WIDTH,
        initial_indent=f"{finding.mark:<5}{finding.section:<{_INDENT - 5}}",
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def as_json(findings: Iterable[Finding], status: int) -> str:
    """The findings as JSON for programs; ``status`` is the exit status."""
    made = {"status": status, "findings": [asdict(finding) for finding in findings]}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def status_of(findings: Iterable[Finding]) -> int:
    """The exit status: 1 if something is off, or if it is not known whether it is; else 0."""
    return int(any(f.mark == "off" or f.facts.get("is_known") is False for f in findings))
