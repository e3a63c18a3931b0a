# SPDX-License-Identifier: Apache-2.0
"""Finds the tool that a finished turn waits for, from the token ids of its answer."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.request import Request

from vllm_stateful.schedule.tool_calls import MARKERS, first_tool

logger = init_logger("vllm.stateful")

NUM_TOKENS = 256
"""Tokens that are decoded: around the last marker, or at each end of an answer without a marker."""

NUM_BEFORE = 16
"""Tokens before a marker that may hold the name (gpt-oss: ``to=functions.NAME<|channel|>``)."""


class CalledTools:
    """Reads the call in an answer.

    Args:
        tokenizer: the one that the engine core holds for structured outputs. With None, every wait
            counts as one for the user.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._markers: frozenset[int] | None = None
        self.num_failed = 0
        """Answers that could not be read."""
        self._is_failing = False
        if tokenizer is None:
            logger.warning("stateful: no tokenizer in the engine: tools are not told apart")

    def __call__(self, request: Request) -> str | None:
        """The name of the tool; None when the answer calls none.

        Never fails. A tokenizer that cannot decode what the model generated (an id beyond its
        vocabulary) must not end the engine. The next answer is tried again.
        """
        if self._tokenizer is None:
            return None
        try:
            name = self._read(request)
        except Exception as error:  # a tokenizer of any kind
            self.num_failed += 1
            if not self._is_failing:
                logger.warning("stateful: a tool is not known, as decoding failed: %r", error)
            self._is_failing = True
            return None
        self._is_failing = False
        return name

    def _read(self, request: Request) -> str | None:
        answer = list(request.output_token_ids)
        if self._markers is None:
            vocabulary = self._tokenizer.get_vocab()
            self._markers = frozenset(vocabulary[text] for text in MARKERS if text in vocabulary)
        markers = self._markers
        marked = [place for place, token in enumerate(answer) if token in markers]
        if marked:
            start = max(0, marked[-1] - NUM_BEFORE)
            parts = [answer[start : start + NUM_TOKENS]]
        elif len(answer) <= 2 * NUM_TOKENS:
            parts = [answer]
        else:
            parts = [answer[:NUM_TOKENS], answer[-NUM_TOKENS:]]
        for part in parts:
            name = first_tool(self._tokenizer.decode(part, skip_special_tokens=False))
            if name is not None:
                return name
        return None
