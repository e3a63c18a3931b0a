# SPDX-License-Identifier: Apache-2.0
"""Queries without variables, and what counts as an empty panel."""

import pytest

from benchmarks.demo.dashboard.__main__ import parse, summary, table
from benchmarks.demo.dashboard.panels import Panel, filled, read_panels, shown


def test_no_query_of_the_dashboard_keeps_a_variable() -> None:
    panels = read_panels()
    assert len({panel.title for panel in panels}) == len(panels) > 30
    assert not any("$" in query for panel in panels for query in panel.queries)


def test_a_variable_that_is_not_known_is_an_error() -> None:
    assert filled('rate(x{instance=~"$instance"}[$__rate_interval])').startswith(
        'rate(x{instance=~".*"}['
    )
    with pytest.raises(ValueError, match=r"\$model"):
        filled('x{model="$model"}')


def test_what_a_panel_shows() -> None:
    panel = Panel("a title", ("first", "second"))
    series = [
        {"metric": {"how": "full"}, "values": [[1, "0"], [2, "NaN"], [3, "0"]]},
        {"metric": {"how": "delta"}, "values": [[1, "0"], [2, "2.5"]]},
        {"metric": {"how": "none"}, "values": [[1, "NaN"]]},
    ]
    made = shown(panel, [series, []])
    assert (made.series, made.largest, made.all_zero) == (2, 2.5, ["full"])
    assert made.empty_queries == ["second"]
    assert not made.is_empty
    assert not made.is_flat
    flat = shown(panel, [series[:1], series[:1]])
    assert flat.is_flat
    empty = shown(panel, [[], series[2:]])
    assert empty.is_empty
    told = summary([made, flat, empty], {"one": ["vllm:a metric names", "vllm_stateful_b no help"]})
    assert (told["empty"], told["only_zero"]) == (["a title"], ["a title"])
    assert told["promtool_on_metrics_of_the_plugin"] == ["vllm_stateful_b no help"]
    assert told["promtool_on_metrics_of_vllm"] == {"metric names": 1}
    assert table([made]).splitlines()[1].split() == ["a", "title", "2", "2.5", "full"]


def test_command_line() -> None:
    assert parse(["--only", "off,agents"]).only == ["off", "agents"]
    assert "windows" in parse([]).only
    with pytest.raises(SystemExit):
        parse(["--only", "none"])
