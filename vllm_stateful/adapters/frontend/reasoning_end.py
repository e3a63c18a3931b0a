# SPDX-License-Identifier: Apache-2.0
"""Whether a prompt ends inside reasoning, without a search through all of it."""

from __future__ import annotations

from typing import Any

from vllm_stateful.transport.prompt_ids import PromptTokenIds


def is_reasoning_end(parser: Any, token_ids: Any) -> bool | None:
    """Hook of ``reasoning-end``: what the last thinking token says, if its place is known.

    Args:
        parser: vLLM's reasoning parser, with the ids of its two thinking tokens.
        token_ids: of a prompt.

    Returns:
        None where the prompt does not know; vLLM searches then.
    """
    if not isinstance(token_ids, PromptTokenIds):
        return None
    end, start = parser.end_token_id, parser.start_token_id
    return token_ids.last_place(end) > token_ids.last_place(start)
