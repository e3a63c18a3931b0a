# SPDX-License-Identifier: Apache-2.0
"""Findings as text, as JSON, and as an exit status."""

import json

import pytest

from vllm_stateful.cli.findings import WIDTH, Finding, Mark, as_json, as_text, status_of


def test_a_line_has_its_mark_its_section_and_what_was_found() -> None:
    assert as_text([Finding("sessions", "ok", "kept")]) == "ok   sessions     kept\n"


def test_a_long_line_goes_on_under_its_text() -> None:
    lines = as_text([Finding("fit", "warn", "many words " * 30)]).splitlines()
    assert len(lines) > 1
    assert all(len(line) <= WIDTH for line in lines)
    assert all(line.startswith(" " * 18 + "many") for line in lines[1:] if "many" in line[:23])


@pytest.mark.parametrize(
    ("mark", "facts", "status"),
    [("ok", {}, 0), ("warn", {}, 0), ("off", {}, 1), ("warn", {"is_known": False}, 1)],
)
def test_the_status_is_one_where_something_is_off_or_not_known(
    mark: Mark, facts: dict[str, bool], status: int
) -> None:
    findings = [Finding("versions", "ok", "fine"), Finding("sessions", mark, "so", facts)]
    assert status_of(findings) == status


def test_json_has_the_same_and_the_facts() -> None:
    made = json.loads(as_json([Finding("sessions", "ok", "kept", {"groups": "1 full"})], 0))
    assert made == {
        "status": 0,
        "findings": [
            {"section": "sessions", "mark": "ok", "text": "kept", "facts": {"groups": "1 full"}}
        ],
    }
