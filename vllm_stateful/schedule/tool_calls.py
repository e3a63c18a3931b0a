# SPDX-License-Identifier: Apache-2.0
"""Which tool an answer calls, read from its text in the styles of vLLM's tool parsers.

Only used to forecast how long the tool takes. An answer without a recognized call counts as a wait
for the user.
Source: vllm/tool_parsers (hermes, qwen3coder, llama, mistral, openai, deepseekv3, kimi_k2, glm4).
"""

from __future__ import annotations

import re

MARKERS = (
    "<tool_call>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "<|channel|>",
    "<｜tool▁call▁begin｜>",
    "<|tool_call_begin|>",
)
"""Texts that begin a call, in models that have a token for them."""

_NAME = r"([\w.\-]{1,128})"
_JSON_NAME = r'\{\s*"(?:type"\s*:\s*"function"\s*,\s*")?name"\s*:\s*"' + _NAME + '"'
_STYLES = tuple(
    re.compile(style)
    for style in (
        r"<tool_call>\s*" + _JSON_NAME,
        r"<function=" + _NAME + r">",
        r"<tool_call>\s*" + _NAME + r"\s*(?:\n|<arg_key>|</tool_call>)",
        r"(?:<\|python_tag\|>|\A)\s*\[?\s*" + _JSON_NAME + r'\s*,\s*"(?:parameters|arguments)"',
        r"\[TOOL_CALLS\]\s*\[\s*" + _JSON_NAME,
        r"\[TOOL_CALLS\]\s*" + _NAME + r"\s*(?:\[ARGS\]|\[CALL_ID\]|\{)",
        r"\bto=functions\." + _NAME,
        r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?" + _NAME,
        r"<\|tool_call_begin\|>\s*(?:functions\.)?" + _NAME,
    )
)


def first_tool(answer: str) -> str | None:
    """The name of the tool that an answer calls first; None when no call is recognized.

    Args:
        answer: the text of the answer, special tokens included. Its beginning may be missing.
    """
    found = [match for style in _STYLES if (match := style.search(answer)) is not None]
    return min(found, key=re.Match.start).group(1) if found else None
