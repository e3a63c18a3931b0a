# SPDX-License-Identifier: Apache-2.0
"""Says whether reasoning has ended in a prompt, without a search through all of the prompt."""

from __future__ import annotations

from typing import Any

from vllm_stateful.transport.prompt_ids import PromptTokenIds


def is_reasoning_end(parser: Any, token_ids: Any) -> bool | None:
    """Hook of ``reasoning-end``: whether the last thinking token is the one that ends thinking.

    Args:
        parser: vLLM's reasoning parser, with the ids of its two thinking tokens.
        token_ids: the token ids of a prompt.

    Returns:
        None where the prompt is a plain list. vLLM then searches.
    """
    if not isinstance(token_ids, PromptTokenIds):
        return None
    end, start = parser.end_token_id, parser.start_token_id
    return token_ids.last_place(end) > token_ids.last_place(start)
