# SPDX-License-Identifier: Apache-2.0
"""Follows the tool calls in an answer while it is generated, and judges them.

It knows the forms of calls that vLLM's tool parsers read. Text that it does not recognise as a call
is left alone. Source: vllm/tool_parsers (hermes, llama, mistral) and vllm/parser/mistral.py of vLLM
0.32, and vllm/tool_parsers/streaming.py for the two forms of guided JSON.

It runs for each token, in the process that serves all clients, on text and schemas that a client
chose. So it reads on from where it stopped. A call is parsed anew at each look; this work is
counted in the steps of ``answer.tool_schemas``. An answer earns steps by its length, and a look
waits until there are enough. A call that cannot be judged is not looked at again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from vllm_stateful.answer.compiled_schema import SchemaError
from vllm_stateful.answer.json_scanner import JsonScanner
from vllm_stateful.answer.partial_schema import Steps, objection
from vllm_stateful.answer.stack_room import with_room
from vllm_stateful.answer.tool_schemas import LOOK_STEPS, ToolSchemas

MAX_CHARS = 256 * 1024
"""The most characters of a call; a longer one is not judged."""

OFTEN = 4096
"""Characters up to which a call is judged at each cut. A longer call is judged when it has grown by
1/16."""

MAX_OPEN = 256
"""The most open brackets; an answer with more is not looked at any more."""

MAX_REASON = 200
"""Characters of a reason."""

COMPLETE = "tool_call_complete"
"""The reason when a turn ends because its last allowed call is complete. Clients do not see it."""

INVALID = "invalid_tool_call"
"""How the reason begins when a turn ends at an invalid call."""


_CLOSING = "</tool_call>"

STEPS_PER_LOOK = 15
"""Steps that every look takes, whatever its length."""

_STRUCTURE = ((b"{", 400), (b"[", 100), (b",", 150), (b"\\", 10))
_DIGITS = (b"0123456789", 60)
_OTHER = 3
"""Thousandths of a step that parsing one character takes: what all characters take (``_OTHER``),
and what digits and structural characters take beside that. Measured with Python 3.11."""


class Form(StrEnum):
    """How calls are written in the text."""

    HERMES = "hermes"
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``"""
    LLAMA = "llama"
    """``{"name": ..., "parameters": {...}}`` at the beginning; more calls follow semicolons."""
    MISTRAL = "mistral"
    """``[TOOL_CALLS]NAME[ARGS]{...}``, or ``[TOOL_CALLS][{"name": ..., "arguments": ...}]``."""
    LIST = "list"
    """A list of ``{"name": ..., "parameters": {...}}`` and nothing else: guided JSON."""
    ARGUMENTS = "arguments"
    """The arguments of the one tool that may be called and nothing else: guided JSON."""


class Result(StrEnum):
    """What became of one call; label of ``vllm_stateful_tool_calls_checked_total``."""

    VALID = "valid"
    """It is complete, and nothing is known to be wrong with it."""
    INVALID = "invalid"
    """Its form is wrong, or its tool's schema does not allow it."""
    UNFINISHED = "unfinished"
    """The turn ended inside it."""


class Unchecked(StrEnum):
    """Why tools or calls are not checked; label of ``vllm_stateful_tool_calls_unchecked_total``."""

    PARSER = "parser"
    """The form of the server's tool parser is not known."""
    REASONING = "reasoning"
    """The server's reasoning parser is not known, or the reasoning did not end."""
    PARAMETERS = "parameters"
    """The request asks to go on behind an end, or continues an answer."""
    TOOLS = "tools"
    """A tool is not a function."""
    SCHEMA = "schema"
    """The schema is broken, refers to something outside it, is too large, takes too long to follow,
    or was not compiled when the call ended."""
    TOO_LONG = "too_long"
    """The call takes too long to parse, or more steps than the request has left."""
    TOO_DEEP = "too_deep"
    """The call has too many open brackets."""
    UNREADABLE = "unreadable"
    """An object has the same key twice, or a number has thousands of digits."""
    ERROR = "error"
    """The check itself failed; the error is in the log."""


class Verdict(NamedTuple):
    """Says that the turn must end."""

    end: int
    """The place in the text behind the last character that belongs to the answer."""
    reason: str
    """``COMPLETE``, or ``INVALID`` followed by what is wrong."""


class _Layout(StrEnum):
    CALL = "call"
    CALLS = "calls"
    ARGUMENTS = "arguments"


class _NotYetError(Exception):
    """The schema is being compiled."""


class _UnjudgedError(Exception):
    def __init__(self, why: Unchecked) -> None:
        super().__init__(why)
        self.why = why


class ToolCallStream:
    """The calls of one answer.

    Args:
        form: how calls are written in the text.
        tools: for each tool's name, the JSON Schema of its parameters.
        limit: the number of calls after which the turn ends; None for no limit.
        strict: whether an invalid call ends the turn.
        name: the name of the one tool that may be called, for ``Form.ARGUMENTS``.
        reasoning_end: the text that ends the reasoning. Calls are looked for behind it only. None
            when there is no reasoning or it has ended.
        schemas: the schemas of the same tools, shared with the other answers to the request.
    """

    def __init__(
        self,
        form: Form,
        tools: Mapping[str, Any],
        limit: int | None,
        *,
        strict: bool,
        name: str | None = None,
        reasoning_end: str | None = None,
        schemas: ToolSchemas | None = None,
    ) -> None:
        self.results: Counter[Result] = Counter()
        self.unchecked: Counter[Unchecked] = Counter()
        self._form = form
        self._schemas = schemas or ToolSchemas(tools)
        self._limit = limit
        self._strict = strict
        self._name = name
        self._reasoning_end = reasoning_end
        self._pos = 0
        self._is_first = True
        self._layout = _Layout.CALL
        self._scanner: JsonScanner | None = None
        self._is_call = False
        """Whether the current JSON is known to be a call."""
        self._is_counted = False
        """Whether the result of the current call was counted."""
        self._is_given_up = False
        """Whether the current call cannot be judged."""
        self._num_judged = 0
        """Calls of the current list that are complete and were judged."""
        self._num_calls = 0
        self._judged_at = 0
        self._weight = 0
        """What parsing the current call takes, in thousandths of a step."""
        self._weighed = 0
        """The place in the text up to which ``_weight`` is counted."""
        self._num_seen = 0
        self._verdict: Verdict | None = None
        self._is_over = False

    def look(self, text: str) -> Verdict | None:
        """Look at what was generated since the last look.

        Args:
            text: the whole text generated so far; it only grows.

        Returns:
            Where and why the turn must end; None while it may go on.
        """
        self._schemas.earn(len(text) - self._num_seen)
        self._num_seen = len(text)
        while self._verdict is None and not self._is_over and self._step(text):
            pass
        return self._verdict

    def finish(self) -> None:
        """Record that the turn has ended, by itself or by our verdict."""
        if self._reasoning_end is not None:
            self.unchecked[Unchecked.REASONING] += 1
        elif self._is_inside() and self._is_call and not self._is_counted:
            self.results[Result.UNFINISHED] += 1
        self._is_over = True

    def give_up(self) -> None:
        """Stop checking after an error in the check. The answer goes on unchecked."""
        self.unchecked[Unchecked.ERROR] += 1
        self._reasoning_end = self._scanner = None
        self._is_over = True

    def _is_inside(self) -> bool:
        scanner = self._scanner
        return scanner is not None and scanner.cut > 0 and scanner.end is None

    def _step(self, text: str) -> bool:
        """Take one step through the text; False when the next one needs more text."""
        if self._reasoning_end is not None:
            return self._skip_reasoning(text)
        if self._scanner is None:
            return self._find_call(text)
        if self._scanner.end is None:
            return self._read(text)
        return self._close(text)

    def _skip_reasoning(self, text: str) -> bool:
        marker = self._reasoning_end or ""
        if not self._go_behind(text, marker):
            return False
        self._reasoning_end = None
        while self._pos < len(text) and text[self._pos].isspace():
            self._pos += 1
        return True

    def _go_behind(self, text: str, marker: str) -> bool:
        """Find a marker from the current place on, and go behind it; False when there is none."""
        place = text.find(marker, self._pos)
        if place < 0:
            self._pos = max(self._pos, len(text) - len(marker) + 1)
            return False
        self._pos = place + len(marker)
        return True

    # ---- where a call begins -------------------------------------------------------------------

    def _find_call(self, text: str) -> bool:
        if self._form is Form.HERMES:
            return self._go_behind(text, "<tool_call>") and self._begin(_Layout.CALL)
        if self._form is Form.LLAMA:
            return self._find_llama(text)
        if self._form is Form.MISTRAL:
            return self._find_mistral(text)
        return self._begin(_Layout.CALLS if self._form is Form.LIST else _Layout.ARGUMENTS)

    def _begin(self, layout: _Layout) -> bool:
        self._layout = layout
        self._scanner = JsonScanner(self._pos)
        self._is_counted = self._is_given_up = False
        self._weight, self._weighed = 0, self._pos
        self._is_call = self._form is not Form.LLAMA
        self._num_judged = self._judged_at = 0
        return True

    def _find_llama(self, text: str) -> bool:
        rest = text[self._pos : self._pos + 32]
        before = "<|python_tag|>" if self._is_first else "; "
        if rest.startswith(before):
            rest = rest[len(before) :]
            skipped = len(before)
        elif before.startswith(rest):
            return False
        else:
            skipped = 0
        if not rest:
            return False
        if rest[0] != "{":
            self._is_over = True
            return False
        self._pos += skipped
        self._is_first = False
        return self._begin(_Layout.CALL)

    def _find_mistral(self, text: str) -> bool:
        if self._is_first:
            if not self._go_behind(text, "[TOOL_CALLS]"):
                return False
            self._is_first = False
        head = text[self._pos : self._pos + 512]
        if not head.strip():
            return False
        if head.lstrip()[0] in "[{":
            return self._begin(_Layout.CALLS if head.lstrip()[0] == "[" else _Layout.CALL)
        brace, args = head.find("{"), head.find("[ARGS]")
        ends = [place for place in (brace, args) if place >= 0]
        if not ends:
            self._is_over = len(head) == 512
            return False
        self._name = head[: min(ends)].partition("[CALL_ID]")[0].strip()
        self._pos += args + len("[ARGS]") if args == min(ends) else brace
        return self._begin(_Layout.ARGUMENTS)

    # ---- inside a call -------------------------------------------------------------------------

    def _read(self, text: str) -> bool:
        scanner = self._scanner
        assert scanner is not None
        closed = self._closing_tag(text) if self._form is Form.HERMES else -1
        is_new = scanner.scan(text if closed < 0 else text[:closed])
        fault = scanner.fault
        if fault is None and closed >= 0 and scanner.end is None:
            fault = "it ends inside of the JSON"
        if fault is not None:
            self._broken(text, fault)
            return False
        if scanner.num_open > MAX_OPEN:
            if self._is_call:
                self._unchecked(Unchecked.TOO_DEEP)
            self._is_over = True
            return False
        self._weigh(text, is_new)
        if is_new and not self._is_given_up and self._is_due(scanner):
            with_room(self._judge, text, scanner)
        if scanner.end is None:
            return False
        self._pos = scanner.end
        return True

    def _closing_tag(self, text: str) -> int:
        """The place of the first closing tag: vLLM's parser ends a call there, even in a string."""
        place = text.find(_CLOSING, self._pos)
        self._pos = max(self._pos, len(text) - len(_CLOSING) + 1) if place < 0 else place
        return place

    def _weigh(self, text: str, is_new: bool) -> None:
        """Add what parsing the new text takes. Text without a new cut counts as inside a string."""
        new = text[self._weighed :].encode(errors="replace")
        self._weighed = len(text)
        letters, weight = _DIGITS
        self._weight += _OTHER * len(new) + weight * (len(new) - len(new.translate(None, letters)))
        if is_new:
            self._weight += sum(weight * new.count(letter) for letter, weight in _STRUCTURE)

    def _is_due(self, scanner: JsonScanner) -> bool:
        """Whether to look at the call now. Its end is always looked at."""
        if scanner.end is not None:
            return True
        if not self._strict or not self._schemas.may_look(is_end=False):
            return False
        length = scanner.cut - scanner.start
        return length <= OFTEN or scanner.cut - self._judged_at >= length // 16

    def _broken(self, text: str, problem: str) -> None:
        """Stop at text that is not a call; nothing behind it is looked at."""
        self._is_over = True
        if self._is_call:
            self._object(text, problem)

    def _object(self, text: str, problem: str) -> None:
        if not self._is_counted:
            self.results[Result.INVALID] += 1
            self._is_counted = True
        if self._strict:
            said = f"{INVALID}: {problem}"[:MAX_REASON].encode(errors="replace").decode()
            self._verdict = Verdict(len(text), said)

    def _judge(self, text: str, scanner: JsonScanner) -> None:
        steps = Steps(LOOK_STEPS)
        self._judged_at = scanner.cut
        try:
            document = self._document(text, scanner, steps)
            problem = self._problem(document, scanner.num_open, steps)
        except json.JSONDecodeError as error:
            self._broken(text, f"it is no JSON ({error.msg})")
        except _NotYetError:
            if scanner.end is not None:
                self._unchecked(Unchecked.SCHEMA)
        except _UnjudgedError as unjudged:
            self._unchecked(unjudged.why)
        else:
            if problem is not None:
                self._object(text, problem)
        finally:
            self._schemas.spend(steps)

    def _unchecked(self, why: Unchecked) -> None:
        """Give up the current call, which cannot be judged now or later."""
        self._is_given_up = True
        if not self._is_counted:
            self.unchecked[why] += 1
            self._is_counted = True

    def _document(self, text: str, scanner: JsonScanner, steps: Steps) -> Any:
        if scanner.is_too_deep:
            raise _UnjudgedError(Unchecked.TOO_DEEP)
        if scanner.cut - scanner.start > MAX_CHARS or not self._schemas.may_look(is_end=True):
            raise _UnjudgedError(Unchecked.TOO_LONG)
        try:
            steps.take(STEPS_PER_LOOK + self._weight // 1000)
        except SchemaError:
            raise _UnjudgedError(Unchecked.TOO_LONG) from None
        try:
            return scanner.document(text)
        except json.JSONDecodeError:
            raise
        except ValueError:
            raise _UnjudgedError(Unchecked.UNREADABLE) from None

    def _problem(self, document: Any, num_open: int, steps: Steps) -> str | None:
        if self._layout is _Layout.ARGUMENTS:
            return self._problem_of(self._name, document, num_open, steps)
        if self._layout is _Layout.CALL:
            return self._problem_of_call(document, num_open, steps)
        for place in range(self._num_judged, len(document)):
            is_open = num_open > 1 and place == len(document) - 1
            problem = self._problem_of_call(document[place], num_open - 1 if is_open else 0, steps)
            if problem is not None:
                return problem
            if not is_open:
                self._num_judged = place + 1
        return None

    def _problem_of_call(self, call: Any, num_open: int, steps: Steps) -> str | None:
        if not isinstance(call, dict):
            return "it is no JSON object"
        key = next((key for key in ("arguments", "parameters") if key in call), None)
        self._is_call |= key is not None and "name" in call
        if not self._is_call:
            return None
        name = call.get("name")
        if name is not None and name not in self._schemas:
            return _unknown(name)
        if not num_open and (key is None or "name" not in call):
            return "it has no name" if key is not None else "it has no arguments"
        if key is None or "name" not in call:
            return None
        is_last = next(reversed(call)) == key
        return self._problem_of(name, call[key], max(0, num_open - 1) if is_last else 0, steps)

    def _problem_of(self, name: Any, arguments: Any, num_open: int, steps: Steps) -> str | None:
        if name not in self._schemas:
            return _unknown(name)
        try:
            schema = self._schemas.compiled(name, steps)
            if schema is None:
                raise _NotYetError
            found = objection(schema, arguments, num_open, steps)
        except SchemaError:
            self._schemas.reject(name)
            raise _UnjudgedError(Unchecked.SCHEMA) from None
        if found is None:
            return None
        return f"{name}: {found._replace(path=f'arguments{found.path}')}"

    # ---- behind a call -------------------------------------------------------------------------

    def _close(self, text: str) -> bool:
        if self._form is Form.HERMES:
            rest = text[self._pos : self._pos + 64].lstrip()
            if not rest.startswith(_CLOSING):
                if not _CLOSING.startswith(rest):
                    self._broken(text, "text follows its JSON")
                return False
            self._pos = text.index(_CLOSING, self._pos) + len(_CLOSING)
        self._count()
        self._scanner = None
        self._is_over = not self._is_call or self._form in (Form.LIST, Form.ARGUMENTS)
        if self._limit is not None and self._num_calls >= self._limit:
            self._verdict = Verdict(self._pos, COMPLETE)
        self._is_first = self._form is Form.MISTRAL
        return True

    def _count(self) -> None:
        if not self._is_call:
            return
        num = self._num_judged if self._layout is _Layout.CALLS else 1
        if not self._is_counted:
            self.results[Result.VALID] += num
        self._num_calls += max(num, 1)


def _unknown(name: Any) -> str:
    if isinstance(name, dict | list):
        return "there is no tool of such a name"
    return f"there is no tool {json.dumps(name[:60] if isinstance(name, str) else name)[:60]}"
