# SPDX-License-Identifier: Apache-2.0
"""The patches at both ends of a turn, on the installed vLLM: see ``test_patched.py``."""

import asyncio
import importlib.util
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from vllm.renderers import hf
from vllm.v1.engine.output_processor import OutputProcessor

from vllm_stateful.compat.ledger import patch_of

pytestmark = pytest.mark.usefixtures("stock_vllm")

MESSAGES: list[Any] = [{"role": "user", "content": str(i)} for i in range(5)]


# --- finished-answer


def finish() -> tuple[Any, Any]:
    """A processor with one request, and that request's state, after it has finished."""
    processor: Any = object.__new__(OutputProcessor)
    state = SimpleNamespace(request_id="r", external_req_id="e", parent_req=None)
    processor.request_states = {"r": state}
    processor.external_req_ids = defaultdict(list, {"e": ["r"]})
    processor.parent_requests = {}
    processor.admission_stats = None
    processor._finish_request(state)
    return processor, state


def test_finished_answer_hook_gets_the_state_when_vllm_is_done() -> None:
    patch_of("finished-answer").apply()
    seen: list[Any] = []
    patch_of("finished-answer").calls[0].set(seen.append)
    processor, state = finish()
    assert seen == [state]
    assert processor.request_states == {}


def test_stock_tells_nobody_what_was_generated() -> None:
    assert not hasattr(OutputProcessor, "finish_hooks")


# --- message-parsing


def parse(messages: list[Any]) -> list[Any]:
    config = MagicMock(multimodal_config=None)
    made, data, uuids = asyncio.run(hf.parse_chat_messages_async(messages, config, "string"))
    assert data is None
    assert uuids is None
    return list(made)


def test_message_parsing_hook_may_parse_only_some() -> None:
    stock = parse(MESSAGES)
    patch_of("message-parsing").apply()
    assert parse(MESSAGES) == stock
    seen: list[Any] = []

    async def last_only(original: Any, messages: Any, *arguments: Any) -> Any:
        seen.append(arguments[1:])
        return await original(messages[-1:], *arguments)

    patch_of("message-parsing").calls[0].set(last_only)
    assert parse(MESSAGES) == stock[-1:]
    assert seen == [("string", None, None)]


def test_stock_parses_every_message_of_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    chat_utils: Any = sys.modules[hf.parse_chat_messages_async.__module__]
    name = "_parse_chat_message_content"
    name = name if hasattr(chat_utils, name) else name.removeprefix("_")  # public in vLLM 0.33
    one = getattr(chat_utils, name)

    def counted(message: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(message)
        return one(message, *args, **kwargs)

    monkeypatch.setattr(chat_utils, name, counted)
    for _ in range(2):
        parse(MESSAGES)
    assert seen == MESSAGES * 2
