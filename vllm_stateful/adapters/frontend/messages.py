# SPDX-License-Identifier: Apache-2.0
"""Parses and renders only the messages that a turn adds, with vLLM's own functions."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from vllm.logger import init_logger

from vllm_stateful.adapters.frontend.turn_context import prompt_owner
from vllm_stateful.observe.prompt_counts import PROMPT_COUNTS, Rendered
from vllm_stateful.render.append_only import is_append_only
from vllm_stateful.render.continued_text import continued_text, generation_prompt
from vllm_stateful.render.message_memory import (
    Conversation,
    Known,
    MessageMemory,
    Text,
    exact_image,
    images_of,
)

logger = init_logger("vllm.stateful")

_ASKS = "add_generation_prompt"

_memory = MessageMemory()


class ParsedMessages(list[Any]):
    """A parsed conversation that knows which messages were seen before."""

    scope: Hashable
    known: Known
    kept: Conversation | None


async def parse_new_messages(
    parse: Callable[..., Any],
    messages: list[Any],
    model_config: Any,
    content_format: str,
    media_io_kwargs: Any,
    mm_processor_kwargs: Any,
) -> Any:
    """Hook of ``message-parsing``: does what ``parse_chat_messages_async`` does.

    Only plain conversations are remembered. New messages may have media.
    """
    arguments = (model_config, content_format, media_io_kwargs, mm_processor_kwargs)
    images = None if mm_processor_kwargs else images_of(messages)
    if images is None:
        return await parse(messages, *arguments)
    scope = (prompt_owner(), id(model_config), content_format)
    known = _memory.find(scope, images)
    new = messages[known.num_messages :]
    conversation, mm_data, mm_uuids = await parse(new, *arguments)
    parsed = known.parsed + conversation
    made = ParsedMessages(dict(message) for message in parsed)
    made.scope, made.known, made.kept = scope, known, None
    if mm_data is None and mm_uuids is None:
        made.kept = _memory.keep(scope, images, parsed, known)
    return made, mm_data, mm_uuids


class ChatRenderer:
    """Renders a conversation from where it continues an earlier one.

    Args:
        render: vLLM's ``safe_apply_chat_template``.
        resolve: gives the source of the template that it will use.
        verified_share: share of the conversations that are rendered in full as well.
    """

    def __init__(
        self,
        render: Callable[..., Any],
        resolve: Callable[..., str | None],
        verified_share: float,
    ) -> None:
        self._render = render
        self._resolve = resolve
        self._verified_share = verified_share
        self._off = False

    def __call__(self, model_config: Any, tokenizer: Any, conversation: Any, **options: Any) -> Any:
        """As ``safe_apply_chat_template``."""
        if self._off or not isinstance(conversation, ParsedMessages) or conversation.kept is None:
            return self._render(model_config, tokenizer, conversation, **options)

        def render(messages: Sequence[Any], asks: bool) -> str:
            wanted = {**options, _ASKS: asks}
            return str(self._render(model_config, tokenizer, list(messages), **wanted))

        template = self._template_of(model_config, tokenizer, conversation, options)
        text = None if template is None else self._continue(render, conversation, template)
        if template is None or text is None:
            PROMPT_COUNTS.rendered(Rendered.FULL)
            full = self._render(model_config, tokenizer, conversation, **options)
            if template is not None:
                self._remember(render, conversation, template, full, options)
            return full
        PROMPT_COUNTS.rendered(Rendered.INCREMENTAL)
        _memory.add_text(conversation.scope, conversation.kept, template, text)
        whole = text.body + (text.generation_prompt if options.get(_ASKS) else "")
        return self._verified(whole, model_config, tokenizer, conversation, options)

    def _template_of(
        self, model_config: Any, tokenizer: Any, conversation: ParsedMessages, options: Any
    ) -> Hashable | None:
        """Template and arguments as a key; None when the request is not a plain one."""
        if options.get("tokenize") is not False or options.get("continue_final_message"):
            return None
        if any(message["role"] == "developer" for message in conversation):
            return None  # vLLM may move such messages
        source = self._resolve(
            tokenizer,
            chat_template=options.get("chat_template"),
            tools=options.get("tools"),
            model_config=model_config,
        )
        if source is None or not is_append_only(source):
            return None
        others = {key: options[key] for key in sorted(options) if key != _ASKS}
        return (source, exact_image(others) or repr(others))

    @staticmethod
    def _continue(render: Any, conversation: ParsedMessages, template: Hashable) -> Text | None:
        known = conversation.known
        text = known.conversation.texts.get(template)
        if text is None or known.num_messages < 2:
            return None
        try:
            body = continued_text(render, conversation, text.body, known.num_messages)
        except Exception as error:  # a template may refuse what is only part of a conversation
            logger.debug("stateful: rendered in full: %r", error)
            return None
        return None if body is None else text._replace(body=body)

    @staticmethod
    def _remember(
        render: Any, conversation: ParsedMessages, template: Hashable, text: Any, options: Any
    ) -> None:
        """After a full rendering: the text without its generation prompt."""
        assert conversation.kept is not None
        prompt = generation_prompt(render, conversation)
        if prompt is None:
            return
        suffix = prompt if options.get(_ASKS) else ""
        if isinstance(text, str) and text.endswith(suffix):
            made = Text(text[: len(text) - len(suffix)], prompt)
            _memory.add_text(conversation.scope, conversation.kept, template, made)

    def _verified(
        self, text: str, model_config: Any, tokenizer: Any, conversation: Any, options: Any
    ) -> str:
        """Render a share of the conversations in full as well; that is what is used then."""
        if random.random() >= self._verified_share:
            return text
        full = self._render(model_config, tokenizer, list(conversation), **options)
        if full != text:
            self._off = True
            logger.error(
                "stateful: MISMATCH: a conversation rendered in parts has another text than in "
                "full. Every conversation is rendered in full until the server restarts. Please "
                "report the chat template."
            )
        return str(full)
