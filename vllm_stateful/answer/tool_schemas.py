# SPDX-License-Identifier: Apache-2.0
"""The schemas of one request's tools, and the budget of steps for checking calls by them.

All answers to a request share both: a request with many answers gets no larger part of the process
that serves all clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from vllm_stateful.answer.compiled_schema import CompiledSchema, SchemaError, compile_schema
from vllm_stateful.answer.partial_schema import Steps

Submit = Callable[[Any], "Future[CompiledSchema] | None"]
"""Starts compiling a schema in another thread; returns None when too many wait there."""

INLINE_UNITS = 256
"""Units up to which a schema is compiled at once; a larger one is compiled in another thread."""

STEPS_PER_UNIT = 3
"""Steps that a unit costs when a schema is compiled at once."""

LOOK_STEPS = 6_000
"""Steps that one look at a call may take."""

RESERVE = LOOK_STEPS
"""Steps that are kept for the ends of calls. A call that is not complete can be looked at later."""

MAX_STEPS = 2 * LOOK_STEPS + 2_000
"""Steps that a request begins with, and the most that it can save up. This bounds what can be spent
at once, whatever the number of its answers."""

STEPS_PER_CHAR = 2
"""Steps that each character generated in one of the answers earns."""


class ToolSchemas:
    """What the answers to one request share.

    Args:
        tools: for each tool's name, the JSON Schema of its parameters.
        submit: compiles large schemas in another thread; None rejects them.
    """

    def __init__(self, tools: Mapping[str, Any], submit: Submit | None = None) -> None:
        self._tools = tools
        self._submit = submit
        self._compiled: dict[str, CompiledSchema] = {}
        self._waiting: dict[str, Future[CompiledSchema]] = {}
        self._rejected: set[str] = set()
        self._left = MAX_STEPS

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._tools

    # ---- what may be spent ---------------------------------------------------------------------

    def earn(self, num_chars: int) -> None:
        """Add the steps that ``num_chars`` generated characters earn."""
        self._left = min(MAX_STEPS, self._left + STEPS_PER_CHAR * num_chars)

    def may_look(self, *, is_end: bool) -> bool:
        """Whether steps are left for a look at a call. Its end may use the reserve."""
        return self._left >= LOOK_STEPS + (0 if is_end else RESERVE)

    def spend(self, steps: Steps) -> None:
        """Take the steps that a look used from the budget."""
        self._left -= steps.used

    # ---- schemas -------------------------------------------------------------------------------

    def compiled(self, name: str, steps: Steps) -> CompiledSchema | None:
        """The compiled schema of a tool; None while another thread still compiles it.

        Args:
            name: the name of the tool.
            steps: the budget from which compiling is paid.

        Raises:
            SchemaError: calls cannot be judged by this schema, now or later.
            KeyError: there is no such tool.
        """
        found = self._compiled.get(name)
        if found is not None:
            return found
        if name in self._rejected:
            raise SchemaError("it was rejected")
        try:
            made = self._make(name, steps)
        except SchemaError:
            self.reject(name)
            raise
        if made is not None:
            self._compiled[name] = made
        return made

    def reject(self, name: str) -> None:
        """Never judge by this schema again."""
        self._rejected.add(name)
        self._compiled.pop(name, None)
        self._waiting.pop(name, None)

    def _make(self, name: str, steps: Steps) -> CompiledSchema | None:
        waiting = self._waiting.get(name)
        if waiting is not None:
            return waiting.result() if waiting.done() else None
        schema = self._tools[name]
        try:
            made = compile_schema(schema, INLINE_UNITS)
        except SchemaError:
            steps.take(STEPS_PER_UNIT * INLINE_UNITS)
        else:
            steps.take(STEPS_PER_UNIT * made.units)
            return made
        begun = None if self._submit is None else self._submit(schema)
        if begun is None:
            raise SchemaError("it is too large to compile now")
        self._waiting[name] = begun
        return None
