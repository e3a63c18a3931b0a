# SPDX-License-Identifier: Apache-2.0
"""Chat requests: vLLM validates only the messages whose result their shape does not tell.

FastAPI hands the body of a request to the one field of the route. For the chat route, we replace
that object. Ours leaves plain messages out of the validation, and then puts them back in. A request
with an error is validated again as it came, so the client gets the answer of stock vLLM.

Reading the JSON of a long conversation takes as long again. Between the two, the event loop runs
what is waiting (other requests' tokens).
"""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

from fastapi import FastAPI
from fastapi.dependencies.utils import get_dependant
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.logger import init_logger

from vllm_stateful.config import process_config
from vllm_stateful.observe.prompt_counts import PROMPT_COUNTS, Validated
from vllm_stateful.request.plain_messages import SplitMessages

logger = init_logger("vllm.stateful")

CHAT_PATH = "/v1/chat/completions"

MIN_MESSAGES = 16
"""The fewest messages for which this is done. With fewer there is nothing to gain."""


class PlainMessagesField:
    """The body field of the chat route.

    Args:
        field: FastAPI's field. It does everything but the validation of plain messages.
    """

    def __init__(self, field: Any) -> None:
        self._field = field
        self._off = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._field, name)

    def validate(self, value: Any, values: Any = None, *, loc: tuple[Any, ...] = ()) -> Any:
        """Do what ``ModelField.validate`` does: return the parsed body, and the errors in it."""
        messages = value.get("messages") if isinstance(value, dict) else None
        if self._off or not isinstance(messages, list) or len(messages) < MIN_MESSAGES:
            return self._stock(value, values, loc)
        is_checked = random.random() < process_config().verify_tokens
        parts = SplitMessages(messages)
        made = self._validate(value, parts, values, loc)
        if made is not None and not is_checked:
            PROMPT_COUNTS.validated(Validated.SHAPE)
            return made, []
        PROMPT_COUNTS.validated(Validated.FULL)
        stock, errors = self._stock(value, values, loc)
        if made is not None:
            self._compare(made, stock, errors, parts.plain_places)
        return stock, errors

    def _stock(self, value: Any, values: Any, loc: tuple[Any, ...]) -> Any:
        return self._field.validate(value, values or {}, loc=loc)

    def _validate(
        self, value: dict[str, Any], parts: SplitMessages, values: Any, loc: tuple[Any, ...]
    ) -> Any:
        """The parsed request; None when it has any error, or no plain message."""
        if not parts.num_plain:
            return None
        try:
            made, errors = self._stock({**value, "messages": parts.others}, values, loc)
        except Exception:  # vLLM raises some errors itself; it will again, in full
            return None
        if errors:
            return None
        made.messages = parts.joined(made.messages)
        return made

    def _compare(self, made: Any, stock: Any, errors: Any, places: list[int]) -> None:
        """Compare the plain messages with vLLM's; turn this off when they differ.

        The other messages are vLLM's own. Some of them equal nothing, because vLLM reads their
        content lazily (a content that is an empty list).
        """
        if errors or len(made.messages) != len(stock.messages):
            is_same = False
        else:
            ours, theirs = ([each.messages[place] for place in places] for each in (made, stock))
            is_same = _is_same(ours, theirs)
        if not is_same:
            self._off = True
            logger.error(
                "stateful: MISMATCH: the messages of a chat request are not what vLLM makes of "
                "them. All are validated by vLLM until the server restarts. Please report this "
                "with your version of vLLM and openai."
            )


def validate_plain_messages(app: FastAPI) -> bool:
    """Put our field into the chat route of an API server; whether that was possible and safe.

    It is not possible when the route is not as FastAPI makes it. It is not safe when vLLM's own
    validation of a conversation with all plain shapes returns anything else.
    """
    for route in app.router.routes:
        if getattr(route, "path", None) != CHAT_PATH:
            continue
        fields = getattr(getattr(route, "dependant", None), "body_params", None)
        if not isinstance(fields, list) or len(fields) != 1:
            break
        annotation = getattr(getattr(fields[0], "field_info", None), "annotation", None)
        if annotation is not ChatCompletionRequest or not _passes_trial(fields[0]):
            break
        fields[0] = PlainMessagesField(fields[0])
        wait = get_dependant(path=CHAT_PATH, call=_let_others_run)
        route.dependant.dependencies.append(wait)
        return True
    logger.warning("stateful: chat requests are validated by vLLM: the route is not as expected")
    return False


async def _let_others_run() -> None:
    """A dependency of the route, which runs after the JSON was read and before it is validated."""
    await asyncio.sleep(0)


def _passes_trial(field: Any) -> bool:
    body = {"model": "trial", "messages": _TRIAL}
    made, errors = field.validate(json.loads(json.dumps(body)), {}, loc=("body",))
    return not errors and _is_same(SplitMessages(_TRIAL).joined([]), made.messages)


def _is_same(ours: list[Any], stock: list[Any]) -> bool:
    """Whether plain messages are equal, including the order of the keys."""
    try:
        return json.dumps(ours) == json.dumps(stock)
    except TypeError:  # vLLM makes something of one of them that is not JSON
        return False


def _call(name: str) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}}


_TRIAL: list[dict[str, Any]] = [
    {"role": "system", "content": "s"},
    {"role": "developer", "content": "d"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": None, "tool_calls": [_call("a"), _call("b")]},
    {"role": "tool", "tool_call_id": "a", "content": "r"},
    {"role": "assistant", "content": "t", "tool_calls": [_call("c")]},
    {"role": "tool", "content": "r", "tool_call_id": "c"},
    {"role": "assistant", "tool_calls": [_call("d")]},
    {"role": "assistant", "content": "t"},
]
"""A message of each plain shape."""
