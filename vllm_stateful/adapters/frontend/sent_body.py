# SPDX-License-Identifier: Apache-2.0
"""The JSON body of an HTTP request as the client sent it.

vLLM's models of Anthropic requests drop fields that they do not know (``cache_control``). The chat
request that vLLM makes of one has even less (no ``metadata``). FastAPI has read the body before,
and starlette keeps what it read, so nothing is parsed a second time here.
"""

from __future__ import annotations

import hashlib
from typing import Any

from vllm_stateful.observe.hint_counts import HINT_COUNTS
from vllm_stateful.render.message_memory import exact_image
from vllm_stateful.request import RetentionWish, retention_wish
from vllm_stateful.request.shape import num_inline_system
from vllm_stateful.types import HintSource

TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call")
"""Fields of a chat, responses or Anthropic request that say which tools there are."""

_WISH = "stateful_retention_wish"


def sent_body(raw_request: Any | None) -> dict[str, Any]:
    """The body of a request whose handler runs; empty where it is not a JSON object.

    It must not be changed. ``await raw_request.json()`` would return the same, but vLLM asks for
    the session id in a function that is not async.
    """
    body = getattr(raw_request, "_json", None)
    return body if isinstance(body, dict) else {}


def wish_of(raw_request: Any | None) -> RetentionWish | None:
    """How long the client wishes its conversation kept; the body is searched only once."""
    body = sent_body(raw_request)
    if raw_request is None or not body:
        return None
    if not hasattr(raw_request.state, _WISH):
        ignored: set[HintSource] = set()
        setattr(raw_request.state, _WISH, retention_wish(body, ignored))
        HINT_COUNTS.ignore(ignored)
    wish: RetentionWish | None = getattr(raw_request.state, _WISH)
    return wish


def num_merged_system(chat: Any, raw_request: Any | None, body: dict[str, Any]) -> int:
    """The number of system messages in mid-conversation that vLLM merged into the first one.

    vLLM's Messages route does so where the chat template wants the only system message in front.

    Args:
        chat: the chat request that vLLM made of the body.
        raw_request: the HTTP request.
        body: its JSON body.
    """
    scope = getattr(raw_request, "scope", None) or {}
    num_sent = 0
    if str(scope.get("path", "")).endswith("/v1/messages"):
        num_sent = num_inline_system(body)
    if not num_sent:
        return 0
    made = {"messages": list(getattr(chat, "messages", ()))}
    return max(0, num_sent - num_inline_system(made))


def digest_of_tools(body: dict[str, Any]) -> bytes:
    """A digest of the tools in a body, and of how they may be chosen."""
    said = {name: body[name] for name in TOOL_FIELDS if name in body}
    image = exact_image(said) or repr(said).encode()
    return hashlib.blake2b(image, digest_size=16).digest()
