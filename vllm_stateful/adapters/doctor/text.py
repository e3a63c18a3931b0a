# SPDX-License-Identifier: Apache-2.0
"""Finds which stages of a prompt cost only what a turn adds, and if messages are told apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.renderers import renderer_from_config
from vllm.renderers.chat_utils import load_chat_template
from vllm.renderers.hf import resolve_chat_template

from vllm_stateful.adapters.doctor.configuration import Asked
from vllm_stateful.adapters.engine.message_boundaries import boundary_rules
from vllm_stateful.adapters.frontend.renderer import StatefulHfRenderer
from vllm_stateful.cli.findings import Finding
from vllm_stateful.config import process_config
from vllm_stateful.render.append_only import is_append_only

_IN_FULL = "every conversation is rendered in full"


def stages(asked: Asked, config: Any) -> Iterator[Finding]:
    """The findings about a prompt's text; the renderer is made as an API server makes it."""
    renderer = renderer_from_config(config)
    if not isinstance(renderer, StatefulHfRenderer):
        text = f"vLLM's {type(renderer).__name__} writes and tokenizes every prompt in full"
        yield Finding("tokenizer", "warn", text)
        return
    yield _template(asked.arguments.chat_template, renderer)
    reason = renderer.tokenizer_off
    if reason is None:
        yield Finding("tokenizer", "ok", "prompts are tokenized in parts")
    else:
        yield Finding("tokenizer", "warn", f"every prompt is tokenized in full: {reason}")
    if boundary_rules(renderer.tokenizer) is None:
        text = "not known in this vocabulary: sessions are given back without regard to messages"
        yield Finding("markers", "warn", text)
    else:
        yield Finding("markers", "ok", "sessions know where their messages begin")


def _template(named: str | None, renderer: Any) -> Finding:
    source = resolve_chat_template(
        renderer.tokenizer,
        chat_template=load_chat_template(named),
        tools=None,
        model_config=renderer.model_config,
    )
    if "messages" in process_config().disable:
        return Finding("template", "warn", f"{_IN_FULL}: --stateful-disable messages")
    if source is None:
        return Finding("template", "warn", "the model has none: chats need --chat-template")
    if not is_append_only(source):
        why = "the template does not write each message on its own"
        return Finding("template", "warn", f"{_IN_FULL}: {why}")
    return Finding("template", "ok", "long conversations are rendered in parts")
