# SPDX-License-Identifier: Apache-2.0
"""API process: what an HTTP request says about being answered from memory.

Noted by ``TenantMiddleware``, which is outside of every task that vLLM makes for a request, so that
it is seen where the request is sent to the engine; the tools are added once the body was read.
"""

from __future__ import annotations

import hashlib
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vllm_stateful.config import load_config
from vllm_stateful.render.message_memory import exact_image

TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call")
"""Fields of a chat, responses or Anthropic request that say which tools there are."""


@dataclass
class Asked:
    """One HTTP request.

    Attributes:
        is_stored: whether its answer may be kept (``Cache-Control: no-store`` says no).
        is_looked_up: whether it may be answered from memory (``no-cache`` says no, too).
        tools: a digest of the tools and how they may be chosen.
    """

    is_stored: bool
    is_looked_up: bool
    tools: bytes = b""


_asked: ContextVar[Asked | None] = ContextVar("stateful_asked", default=None)


@lru_cache(maxsize=1)
def is_cache_on() -> bool:
    """Whether answers are kept at all (``--stateful-response-cache-bytes``)."""
    return load_config().response_cache_bytes > 0


def note_headers(headers: Any) -> None:
    """An HTTP request begins.

    Args:
        headers: starlette's, or any mapping with lower-case names.
    """
    if is_cache_on():
        said = {part.strip().lower() for part in headers.get("cache-control", "").split(",")}
        no_store = "no-store" in said
        is_looked_up = not no_store and "no-cache" not in said and "max-age=0" not in said
        _asked.set(Asked(not no_store, is_looked_up))


def note_tools(body: dict[str, Any]) -> None:
    """Its body was read."""
    asked = _asked.get()
    if asked is not None:
        said = {name: body[name] for name in TOOL_FIELDS if name in body}
        image = exact_image(said) or repr(said).encode()
        asked.tools = hashlib.blake2b(image, digest_size=16).digest()


def current() -> Asked | None:
    """The HTTP request that is being served; None where there is none."""
    return _asked.get()
