# SPDX-License-Identifier: Apache-2.0
"""Reads where messages begin in token ids, with the tokenizer that the engine core holds."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from vllm_stateful.prefix.boundaries import BoundaryRules

logger = init_logger("vllm.stateful")


def boundary_rules(tokenizer: Any) -> BoundaryRules | None:
    """The rules of a tokenizer; None, with a line in the log, if it has no known style of chat.

    Args:
        tokenizer: the tokenizer for structured outputs; None when the engine holds none.
    """
    if tokenizer is None:
        return None
    try:
        rules = BoundaryRules.of(
            tokenizer.get_vocab(), lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
        )
    except Exception as error:  # a tokenizer of any kind: sessions work without
        logger.warning("stateful: message boundaries are not known: %r", error)
        return None
    if rules is None:
        logger.info("stateful: message boundaries are not known: no marker in the vocabulary")
    return rules
