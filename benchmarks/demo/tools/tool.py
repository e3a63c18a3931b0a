# SPDX-License-Identifier: Apache-2.0
"""A tool: its schema for the model and the local function that answers the call."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]


def choice(values: Iterable[str], description: str) -> Schema:
    """A string out of a closed list."""
    return {"type": "string", "enum": list(values), "description": description}


def whole(low: int, high: int, description: str) -> Schema:
    """An integer between two bounds, both included."""
    return {"type": "integer", "minimum": low, "maximum": high, "description": description}


def flag(description: str) -> Schema:
    """A boolean."""
    return {"type": "boolean", "description": description}


@dataclass(frozen=True)
class Tool:
    """One function an agent may call; every parameter is required and no other is allowed."""

    function: Callable[..., Any]
    description: str
    properties: dict[str, Schema]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def parameters(self) -> Schema:
        """The closed schema of the arguments."""
        return {
            "type": "object",
            "properties": self.properties,
            "required": list(self.properties),
            "additionalProperties": False,
        }

    def to_openai(self) -> dict[str, Any]:
        """The entry of the request's `tools` list. Strict: a small model nests nonsense without."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self.parameters,
                "strict": True,
            },
        }


@dataclass(frozen=True)
class ToolResult:
    """The text for the `tool` message, and whether the call was true to its schema."""

    text: str
    is_valid: bool


def call_tool(tools: Iterable[Tool], name: str, arguments: str) -> ToolResult:
    """Run the named tool on JSON arguments. A bad call is answered, not raised: agents read it."""
    tool = {tool.name: tool for tool in tools}.get(name)
    if tool is None:
        return _refused(f"no tool is named {name!r}")
    try:
        values = json.loads(arguments)
    except json.JSONDecodeError as error:
        return _refused(f"arguments are not JSON: {error}")
    problem = next(Draft202012Validator(tool.parameters).iter_errors(values), None)
    if problem is not None:
        return _refused(problem.message)
    return ToolResult(json.dumps(tool.function(**values)), is_valid=True)


def _refused(reason: str) -> ToolResult:
    return ToolResult(json.dumps({"error": reason}), is_valid=False)
