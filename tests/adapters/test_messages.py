# SPDX-License-Identifier: Apache-2.0
"""Long conversations through vLLM's own renderer: parsed and rendered in parts, the same text."""

import asyncio
import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.tokenizers.registry import cached_tokenizer_from_config

from benchmarks.models import CACHE
from vllm_stateful.adapters.frontend import messages as adapter
from vllm_stateful.adapters.frontend.renderer import StatefulHfRenderer
from vllm_stateful.compat.ledger import patch_of
from vllm_stateful.config import process_config
from vllm_stateful.observe.prompt_counts import PromptCounts
from vllm_stateful.render.message_memory import MessageMemory

MODEL = CACHE / "tiny-llama"
TOOLS_TEMPLATE = CACHE.parents[1] / "benchmarks" / "models" / "smollm2_tools.jinja"
pytestmark = pytest.mark.skipif(
    not (MODEL / "config.json").exists(), reason="the tiny model is not built (make model)"
)
PARAMS = TokenizeParams(max_total_tokens=16384, add_special_tokens=False)
LOOKS_AHEAD = (
    "{% for message in messages %}{{ message.role + message.content }}"
    "{% if loop.last %}{{ '.' }}{% endif %}{% endfor %}{{ '>' if add_generation_prompt else '' }}"
)


@pytest.fixture(scope="module")
def renderers() -> tuple[Any, Any]:
    """Stock and ours, nothing verified."""
    return make_renderers(verified_share="0")


def make_renderers(verified_share: str) -> tuple[Any, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_STATEFUL_VERIFY_TOKENS", verified_share)
        process_config.cache_clear()
        config = EngineArgs(model=str(MODEL), dtype="float32").create_engine_config()
        tokenizer = cached_tokenizer_from_config(config.model_config)
        return HfRenderer(config, tokenizer), StatefulHfRenderer(config, tokenizer)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[PromptCounts]:
    """The patch applied, nothing remembered, nothing counted."""
    fresh = PromptCounts()
    monkeypatch.setattr(adapter, "PROMPT_COUNTS", fresh)
    monkeypatch.setattr(adapter, "_memory", MessageMemory())
    patch = patch_of("message-parsing")
    applied = patch.is_applied
    patch.apply()
    yield fresh
    if not applied:
        patch.undo()


def message(rng: random.Random, index: int) -> dict[str, Any]:
    """As a client sends it: a tool call's arguments are a string of JSON."""
    if index % 3 == 1:
        arguments = json.dumps({"path": f"/a/{rng.random()}", "n": index})
        call = {
            "id": f"c{index}",
            "type": "function",
            "function": {"name": "f", "arguments": arguments},
        }
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if index % 3 == 2:
        return {"role": "tool", "tool_call_id": f"c{index - 1}", "content": f"out {rng.random()}"}
    return {"role": "user", "content": [{"type": "text", "text": f"go on {index} é"}]}


def text_of(renderer: Any, messages: list[Any], template: str | None, tools: Any) -> str:
    kwargs = {"tokenize": False, "add_generation_prompt": True, "tools": tools}
    params = ChatParams(chat_template=template, chat_template_kwargs=kwargs)

    async def render() -> Any:
        _, (prompt,) = await renderer.render_chat_async([copy.deepcopy(messages)], params, PARAMS)
        return prompt["prompt"]

    return str(asyncio.run(render()))


def same_text(
    renderers: tuple[Any, Any], messages: list[Any], template: str | None = None, tools: Any = None
) -> None:
    stock, ours = renderers
    patch = patch_of("message-parsing")
    patch.undo()
    expected = text_of(stock, messages, template, tools)
    patch.apply()
    assert text_of(ours, messages, template, tools) == expected


def rendered(counts: PromptCounts) -> dict[str, int]:
    return dict(counts.snapshot()["chats_rendered"])


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
def test_turns_are_rendered_in_parts_and_read_the_same(
    renderers: tuple[Any, Any], counts: PromptCounts, tools: Any
) -> None:
    rng = random.Random(1)
    messages = [message(rng, i) for i in range(18)]
    template = TOOLS_TEMPLATE.read_text()
    for turn in range(8):
        same_text(renderers, messages, template, tools)
        messages += [message(rng, len(messages) + i) for i in range(turn % 4)]
    assert rendered(counts) == {"incremental": 7, "full": 1}


def test_an_edit_and_other_tools_are_rendered_in_full(
    renderers: tuple[Any, Any], counts: PromptCounts
) -> None:
    rng = random.Random(2)
    template = TOOLS_TEMPLATE.read_text()
    messages = [message(rng, i) for i in range(18)]
    same_text(renderers, messages, template)
    same_text(renderers, [*messages, message(rng, 18)], template, [{"name": "other"}])
    messages[4]["tool_calls"][0]["function"]["arguments"] = "{}"
    same_text(renderers, [*messages, message(rng, 18)], template)
    assert rendered(counts) == {"incremental": 0, "full": 3}


def test_any_change_in_the_tools_is_rendered_in_full(
    renderers: tuple[Any, Any], counts: PromptCounts
) -> None:
    """Also one of a type, or of the order of the keys: both show in the text."""
    rng = random.Random(5)
    template = TOOLS_TEMPLATE.read_text()
    messages = [message(rng, i) for i in range(18)]
    for number, default in enumerate([1, True, 1.0, {"a": 1, "b": 2}, {"b": 2, "a": 1}]):
        tools = [{"type": "function", "function": {"name": "f", "default": default}}]
        for _ in range(2):
            same_text(renderers, messages, template, tools)
            messages.append(message(rng, len(messages)))
        assert rendered(counts) == {"incremental": number + 1, "full": number + 1}


def test_a_template_that_looks_ahead_is_rendered_in_full(
    renderers: tuple[Any, Any], counts: PromptCounts
) -> None:
    messages = [{"role": "user", "content": str(i)} for i in range(20)]
    for _ in range(3):
        same_text(renderers, messages, LOOKS_AHEAD)
        messages.append({"role": "user", "content": "more"})
    assert rendered(counts) == {"incremental": 0, "full": 3}


def test_other_salts_find_nothing(renderers: tuple[Any, Any], counts: PromptCounts) -> None:
    messages = [{"role": "user", "content": str(i)} for i in range(20)]
    params = ChatParams(chat_template_kwargs={"tokenize": False, "add_generation_prompt": True})

    async def render(salt: str) -> None:
        extras = {"cache_salt": salt}
        await renderers[1].render_chat_async([messages], params, PARAMS, prompt_extras=extras)

    for salt in ("one", "two", "one", "two"):
        asyncio.run(render(salt))
    assert rendered(counts) == {"incremental": 2, "full": 2}


def test_one_difference_turns_it_off(counts: PromptCounts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full text is what is used, and what is used from then on."""
    renderers = make_renderers(verified_share="1")
    monkeypatch.setattr(adapter, "continued_text", lambda *_: "something else")
    messages = [{"role": "user", "content": str(i)} for i in range(20)]
    for _ in range(4):
        same_text(renderers, messages)
        messages.append({"role": "user", "content": "more"})
    assert rendered(counts) == {"incremental": 1, "full": 1}
