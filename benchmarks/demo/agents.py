# SPDX-License-Identifier: Apache-2.0
"""The three agents: their system prompts, their tools and what they are asked, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.demo.tools.data import DATA_TOOLS
from benchmarks.demo.tools.review import REVIEW_TOOLS
from benchmarks.demo.tools.tool import Tool
from benchmarks.demo.tools.travel import TRAVEL_TOOLS

PROMPTS = Path(__file__).with_name("prompts")


@dataclass(frozen=True)
class Step:
    """One turn: what the user says, if anything, and the tool to call, or None for any tool."""

    user: str
    tool: str | None

    @property
    def tool_choice(self) -> str | dict[str, Any]:
        if self.tool is None:
            return "required"
        return {"type": "function", "function": {"name": self.tool}}


@dataclass(frozen=True)
class Agent:
    """A system prompt, five tools and five steps."""

    key: str
    name: str
    tools: Sequence[Tool]
    steps: Sequence[Step]

    @property
    def system_prompt(self) -> str:
        return (PROMPTS / f"{self.key}.md").read_text()


TRAVEL_PLANNER = Agent(
    "travel_planner",
    "Travel Planner",
    TRAVEL_TOOLS,
    (
        Step(
            "We are two adults from Vienna and would like to spend five days in Lisbon in May. We "
            "like old streets, fish and short walks, and the budget is 2,400 euros for everything. "
            "How is the weather going to be?",
            "get_weather",
        ),
        Step("That sounds fine. Please look for flights from Vienna to Lisbon.", "search_flights"),
        Step(
            "Take the direct one. Now we need a room with breakfast for four nights.", "book_hotel"
        ),
        Step("", None),
        Step("Thank you. Please write the plan for the days in Lisbon.", "create_itinerary"),
    ),
)

CODE_REVIEWER = Agent(
    "code_reviewer",
    "Code Reviewer",
    REVIEW_TOOLS,
    (
        Step(
            "Pull request 41 changes the discount function in pricing.py, because customers with "
            "orders above five thousand euros complained that they get ten percent only. Please "
            "review it. Begin with the analysis of the module.",
            "analyze_code",
        ),
        Step("", "run_tests"),
        Step("One test fails on main already, we know. What about the coverage?", "check_coverage"),
        Step("Are there any other issues in the file?", None),
        Step("Now fetch the pull request and compare the tests.", "review_pr"),
    ),
)

DATA_ANALYST = Agent(
    "data_analyst",
    "Data Analyst",
    DATA_TOOLS,
    (
        Step(
            "The board meets on Thursday and wants to know which product earns the most, whether "
            "the regions differ, and how the season went. Begin with the revenue of each product, "
            "largest first.",
            "query_db",
        ),
        Step("Good. Is that stable or do a few large orders make it?", "compute_stats"),
        Step("", "create_chart"),
        Step("And the season, without returned orders?", "run_pipeline"),
        Step("Someone will want to check this. Give them a sample of the orders.", None),
    ),
)

AGENTS = (TRAVEL_PLANNER, CODE_REVIEWER, DATA_ANALYST)
NUM_TURNS = len(TRAVEL_PLANNER.steps)
