# SPDX-License-Identifier: Apache-2.0
"""The schemas of one request's tools, and what may be spent on them.

All answers to a request share them, as they share the process that serves everyone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from vllm_stateful.answer.compiled_schema import CompiledSchema, SchemaError, compile_schema
from vllm_stateful.answer.partial_schema import Steps

Submit = Callable[[Any], "Future[CompiledSchema] | None"]
"""Begins to compile a schema in another thread; None when too many wait there."""

INLINE_UNITS = 256
"""A schema that takes more units to compile is compiled in another thread."""

STEPS_PER_UNIT = 3
"""What a unit costs where the answer waits for it."""

LOOK_STEPS = 6_000
"""Steps that one look at a call may take."""

RESERVE = LOOK_STEPS
"""Steps that are left to the ends of calls: what is not complete is looked at another time."""

MAX_STEPS = 2 * LOOK_STEPS + 2_000
"""Steps that a request begins with, and can save up. So many can be spent at once, whatever the
number of its answers."""

STEPS_PER_CHAR = 2
"""Steps that a character earns that was generated in one of the answers."""


class ToolSchemas:
    """What the answers to one request share.

    Args:
        tools: JSON Schema of the parameters, by the name of the tool.
        submit: compiles what is too large to wait for; None to have it rejected.
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
        """So many characters were generated."""
        self._left = min(MAX_STEPS, self._left + STEPS_PER_CHAR * num_chars)

    def may_look(self, *, is_end: bool) -> bool:
        """Whether there are steps left for a look at a call; its end may use the reserve."""
        return self._left >= LOOK_STEPS + (0 if is_end else RESERVE)

    def spend(self, steps: Steps) -> None:
        """A look is over that used these."""
        self._left -= steps.used

    # ---- schemas -------------------------------------------------------------------------------

    def compiled(self, name: str, steps: Steps) -> CompiledSchema | None:
        """The schema of a tool, compiled the first time; None while another thread does that.

        Raises:
            SchemaError: it cannot be judged, once and for all.
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
