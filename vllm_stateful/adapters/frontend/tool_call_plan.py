# SPDX-License-Identifier: Apache-2.0
"""API process: what a request says of its tool calls, and which form they have in the text.

This is read where a request's session is identified. `TurnContext` carries it to the request's
state in vLLM's output processor.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

from vllm.logger import init_logger

from vllm_stateful.answer.compiled_schema import CompiledSchema, compile_schema
from vllm_stateful.answer.tool_call_stream import Form, ToolCallStream, Unchecked
from vllm_stateful.answer.tool_schemas import ToolSchemas
from vllm_stateful.config import process_config
from vllm_stateful.observe.tool_call_counts import TOOL_CALL_COUNTS

logger = init_logger("vllm.stateful")

FORMS = {
    "Hermes2ProToolParser": Form.HERMES,
    "Llama3JsonToolParser": Form.LLAMA,
    "MistralToolParser": Form.MISTRAL,
}
"""The form of tool calls by vLLM's class of tool parser. Several names of ``--tool-call-parser``
mean one class."""

REASONING_ENDS = {
    "DeepSeekR1ReasoningParser": "</think>",
    "Qwen3ParserReasoningAdapter": "</think>",
    "MistralParserReasoningAdapter": "[/THINK]",
}


MAX_TOOLS = 512
"""A request with more tools is not checked."""

MAX_WAITING = 32
"""The most schemas that wait to be compiled. More of them are rejected."""

PAUSE_S = 0.0005
"""Seconds for which the compiling thread leaves the interpreter to the event loop, each time."""


class ToolCallPlan(NamedTuple):
    """What a request says of its tool calls."""

    form: Form
    tools: Mapping[str, Any]
    """The schemas of the parameters, by the name of the tool."""
    limit: int | None
    name: str | None
    """The name of the one tool that must be called."""
    reasoning_end: str | None
    schemas: ToolSchemas
    """The schemas of the same tools. All answers of a request share one budget for them."""

    def stream(self, *, strict: bool, reasoning_ended: bool) -> ToolCallStream:
        """A stream that follows the tool calls in one answer."""
        return ToolCallStream(
            self.form,
            self.tools,
            self.limit,
            strict=strict,
            name=self.name,
            reasoning_end=None if reasoning_ended else self.reasoning_end,
            schemas=self.schemas,
        )


def mode() -> str:
    """``--stateful-tool-call-check``: off, end or strict."""
    return process_config().tool_call_check


def plan_of(request: Any, raw_request: Any | None) -> ToolCallPlan | None:
    """What is to be checked in the answer to a request; None when nothing is.

    Args:
        request: vLLM's parsed chat or responses request. vLLM makes a chat request of an Anthropic
            one.
        raw_request: the HTTP request. It leads to the server's parsers.
    """
    tools, choice = getattr(request, "tools", None), getattr(request, "tool_choice", None)
    if mode() == "off" or raw_request is None or not tools or choice == "none":
        return None
    found = _plan(request, tools, choice, _parser_of(raw_request))
    if isinstance(found, Unchecked):
        TOOL_CALL_COUNTS.unchecked(Counter([found]))
        return None
    return found


def _parser_of(raw_request: Any) -> Any:
    """The parser class of the server: vLLM makes the same for each of its endpoints."""
    state = getattr(getattr(raw_request, "app", None), "state", None)
    return getattr(getattr(state, "openai_serving_chat", None), "parser_cls", None)


def _plan(request: Any, tools: list[Any], choice: Any, parser: Any) -> ToolCallPlan | Unchecked:
    schemas = _schemas(tools) if len(tools) <= MAX_TOOLS else None
    if schemas is None:
        return Unchecked.TOOLS
    name = _named(choice)
    form = _form_of(parser, name, choice)
    if form is None:
        _say_unknown(getattr(getattr(parser, "tool_parser_cls", None), "__name__", "none"))
        return Unchecked.PARSER
    if _goes_beyond_ends(request):
        return Unchecked.PARAMETERS
    reasoning = parser.reasoning_parser_cls
    if reasoning is not None and reasoning.__name__ not in REASONING_ENDS:
        return Unchecked.REASONING
    is_single = name is not None or getattr(request, "parallel_tool_calls", None) is False
    end = None if reasoning is None else REASONING_ENDS[reasoning.__name__]
    limit = 1 if is_single else None
    return ToolCallPlan(form, schemas, limit, name, end, ToolSchemas(schemas, _compile_elsewhere))


def _form_of(parser: Any, name: str | None, choice: Any) -> Form | None:
    """The form that the calls have in the text; None when it is not known."""
    tool_parser = getattr(parser, "tool_parser_cls", None)
    if tool_parser is None or not _is_plain(parser):
        return None
    if tool_parser.supports_required_and_named and (name is not None or choice == "required"):
        return Form.LIST if name is None else Form.ARGUMENTS
    is_vllms = tool_parser.__module__.startswith("vllm.tool_parsers.")
    return FORMS.get(tool_parser.__name__) if is_vllms else None


def _is_plain(parser: Any) -> bool:
    """Whether a parser only hands the text to its two parsers; harmony's does more."""
    from vllm.parser.abstract_parser import DelegatingParser

    return all(
        getattr(parser, name, None) is getattr(DelegatingParser, name)
        for name in ("parse", "parse_delta")
    )


def _schemas(tools: list[Any]) -> dict[str, Any] | None:
    made: dict[str, Any] = {}
    for tool in tools:
        function = getattr(tool, "function", tool)
        if getattr(tool, "type", None) != "function" or function.name in made:
            return None
        made[function.name] = function.parameters if function.parameters is not None else {}
    return made


def _named(choice: Any) -> str | None:
    function = getattr(choice, "function", choice)
    return getattr(function, "name", None) if getattr(choice, "type", "") == "function" else None


def _goes_beyond_ends(request: Any) -> bool:
    return bool(
        getattr(request, "min_tokens", 0)
        or getattr(request, "ignore_eos", False)
        or getattr(request, "use_beam_search", False)
        or getattr(request, "continue_final_message", False)
        or not getattr(request, "add_generation_prompt", True)
    )


@lru_cache(maxsize=1)
def _compiler() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "stateful-schemas")


_compiling: set[Future[CompiledSchema]] = set()


def _compile_elsewhere(schema: Any) -> Future[CompiledSchema] | None:
    if len(_compiling) >= MAX_WAITING:
        return None
    begun = _compiler().submit(compile_schema, schema, pause=partial(time.sleep, PAUSE_S))
    _compiling.add(begun)
    begun.add_done_callback(_compiling.discard)
    return begun


@lru_cache(maxsize=16)
def _say_unknown(name: str) -> None:
    logger.warning("stateful: tool calls are not checked: tool parser %s is not known", name)
