# SPDX-License-Identifier: Apache-2.0
"""The agents' tools: closed schemas, real results, errors answered instead of raised."""

import json

import pytest

from benchmarks.demo.agents import AGENTS
from benchmarks.demo.tools.data import compute_stats, export_data, query_db, run_pipeline
from benchmarks.demo.tools.review import check_coverage, lint_code, review_pr, run_tests
from benchmarks.demo.tools.tool import Tool, call_tool
from benchmarks.demo.tools.travel import TRAVEL_TOOLS, get_weather, search_flights

ALL_TOOLS = [tool for agent in AGENTS for tool in agent.tools]


def smallest_arguments(tool: Tool) -> dict[str, object]:
    """A valid call: the first choice, the lowest number, false."""
    values: dict[str, object] = {}
    for name, schema in tool.properties.items():
        if "enum" in schema:
            values[name] = schema["enum"][0]
        else:
            values[name] = schema.get("minimum", False)
    return values


@pytest.mark.parametrize("tool", ALL_TOOLS, ids=lambda tool: tool.name)
def test_schema_is_strict_and_closed(tool: Tool) -> None:
    function = tool.to_openai()["function"]
    assert function["strict"] is True
    assert function["parameters"]["additionalProperties"] is False
    assert function["parameters"]["required"] == list(function["parameters"]["properties"])


@pytest.mark.parametrize("tool", ALL_TOOLS, ids=lambda tool: tool.name)
def test_same_call_gives_same_text(tool: Tool) -> None:
    arguments = json.dumps(smallest_arguments(tool))
    first, second = (call_tool([tool], tool.name, arguments) for _ in range(2))
    assert first.is_valid
    assert first == second
    assert "error" not in json.loads(first.text)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("get_wether", "{}", "no tool is named"),
        ("get_weather", '{"city": "Lis', "not JSON"),
        ("get_weather", '{"city": "Lisbon", "month": 5}', "'days' is a required property"),
        ("get_weather", '{"city": "Rome", "month": 5, "days": 5}', "'Rome' is not one of"),
        ("get_weather", '{"city": "Lisbon", "month": 13, "days": 5}', "greater than the maximum"),
    ],
)
def test_bad_call_is_answered(name: str, arguments: str, reason: str) -> None:
    result = call_tool(TRAVEL_TOOLS, name, arguments)
    assert not result.is_valid
    assert reason in json.loads(result.text)["error"]


def test_weather_follows_the_season() -> None:
    summer, winter = get_weather("Oslo", 7, 7), get_weather("Oslo", 1, 7)
    assert min(day["high_c"] for day in summer["forecast"]) > 10
    assert max(day["high_c"] for day in winter["forecast"]) < 5


def test_flights_know_the_distance_and_are_sorted() -> None:
    found = search_flights("Vienna", "Lisbon", 5, 1, "economy")
    assert found["distance_km"] == pytest.approx(2300, abs=25)
    prices = [flight["price_eur"] for flight in found["flights"]]
    assert prices == sorted(prices)


def test_sample_has_one_failing_test_and_the_pull_request_mends_it() -> None:
    assert run_tests("pricing.py", fail_fast=False, repeat=1)["failed"] == 1
    review = review_pr("41", 3, run_checks=True)
    assert review["failed_before"] == ["test_very_large_order"]
    assert review["failed_after"] == []


def test_coverage_names_the_unreached_lines() -> None:
    rows = {row["function"]: row for row in check_coverage("inventory.py", 90, True)["functions"]}
    assert rows["ship"]["percent"] == 100
    assert rows["turnover"]["percent"] == 0
    assert not rows["turnover"]["enough"]


def test_lint_finds_the_planted_mistakes() -> None:
    issues = lint_code("pricing.py", "all", 100)["issues"]
    assert {issue["code"] for issue in issues} == {"B006", "D103", "E501", "E722", "F401"}


def test_query_agrees_with_statistics_and_pipeline() -> None:
    revenue = sum(row["sum_revenue"] for row in query_db("revenue", "sum", "region", True)["rows"])
    groups = compute_stats("revenue", "region", 3)["groups"]
    assert revenue == pytest.approx(sum(row["n"] * row["mean"] for row in groups), rel=1e-4)
    months = run_pipeline("returns_report", 1, 12)["months"]
    assert revenue == pytest.approx(sum(row["revenue"] for row in months), rel=1e-6)


def test_export_keeps_the_limit() -> None:
    exported = export_data("csv", "north", 12)
    assert exported["content"].count("\n") == 13
