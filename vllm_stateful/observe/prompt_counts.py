# SPDX-License-Identifier: Apache-2.0
"""Counts what one API process did with its prompts, for the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import Any


class Rendered(StrEnum):
    """How a long conversation was rendered; the label of ``vllm_stateful_chats_rendered_total``."""

    INCREMENTAL = "incremental"
    """Only messages were rendered that an earlier conversation lacked."""
    FULL = "full"
    """All messages were rendered: a first turn, an edit, or a template that looks at other
    messages."""


class Validated(StrEnum):
    """How a long chat request was validated; label of ``vllm_stateful_chats_validated_total``."""

    SHAPE = "shape"
    """Plain messages were validated by their shape, the others by vLLM."""
    FULL = "full"
    """vLLM validated all messages: the request had an error or no plain message, or it was checked
    (``verify_tokens``)."""


class Tokenized(StrEnum):
    """How a prompt was tokenized; the label of ``vllm_stateful_prompts_tokenized_total``."""

    INCREMENTAL = "incremental"
    """Only the text that an earlier prompt lacked."""
    FULL = "full"
    """In full, and remembered."""
    SHORT = "short"
    """By vLLM, in full, as the prompt is short and there is nothing to gain."""
    TOKENIZER = "tokenizer"
    """By vLLM, as the tokenizer is not known to be safe or the feature is off."""
    PARAMETERS = "parameters"
    """By vLLM, as the prompt must be truncated, padded or lower-cased, or needs character
    offsets."""
    MULTIMODAL = "multimodal"
    """By vLLM, as the prompt is more than text."""
    UNUSUAL = "unusual"
    """By vLLM, as the prompt is not valid Unicode, is too long, or has special tokens that are not
    found at their text."""


class Verified(StrEnum):
    """The result of tokenizing a prompt in full as well."""

    EQUAL = "equal"
    DIFFERENT = "different"


class Sent(StrEnum):
    """How a prompt reached the engine core; the label of ``vllm_stateful_prompts_sent_total``."""

    DELTA = "delta"
    """The version of a base that the engine core holds, and the new token ids."""
    FULL = "full"
    """All token ids."""
    RESENT = "resent"
    """All token ids, after the engine core said that it no longer holds the base."""


class PromptCounts:
    """Running totals of one process."""

    def __init__(self) -> None:
        self._validated = dict.fromkeys(Validated, 0)
        self._rendered = dict.fromkeys(Rendered, 0)
        self._tokenized = dict.fromkeys(Tokenized, 0)
        self._verified = dict.fromkeys(Verified, 0)
        self._sent = dict.fromkeys(Sent, 0)
        self._choices: Counter[str] = Counter()
        self._answers: Counter[str] = Counter()
        self._num_tokens = {"reused": 0, "new": 0}
        self._num_questions_failed = 0
        self._memory: Callable[[], int] = int

    def validated(self, how: Validated) -> None:
        """Count one chat request of many messages."""
        self._validated[how] += 1

    def rendered(self, how: Rendered) -> None:
        """Count one conversation of many messages."""
        self._rendered[how] += 1

    def tokenized(self, how: Tokenized, num_tokens: int = 0, num_reused: int = 0) -> None:
        """Count one prompt of ``num_tokens`` tokens; the first ``num_reused`` were known."""
        self._tokenized[how] += 1
        self._num_tokens["reused"] += num_reused
        self._num_tokens["new"] += num_tokens - num_reused

    def verified(self, result: Verified) -> None:
        """Count one prompt that was tokenized a second time, in full."""
        self._verified[result] += 1

    def sent(self, how: Sent) -> None:
        """Count one request to the engine core."""
        self._sent[how] += 1

    def question_failed(self) -> None:
        """Count one engine core that did not answer whether it takes prompts as deltas."""
        self._num_questions_failed += 1

    def chose(self, why: str) -> None:
        """Count one request that could have gone to several engine cores, by its
        ``transport.session_affinity.Choice``."""
        self._choices[why] += 1

    def answered(self, result: str) -> None:
        """Count what became of one generated answer in a history (``render.splicer``)."""
        self._answers[result] += 1

    def watch_memory(self, num_bytes: Callable[[], int]) -> None:
        """Set the function that returns the size of the remembered texts, in bytes."""
        self._memory = num_bytes

    def snapshot(self) -> dict[str, Any]:
        """Totals by the keys of ``observe.metrics``."""
        return {
            "chats_validated": {str(how): n for how, n in self._validated.items()},
            "chats_rendered": {str(how): n for how, n in self._rendered.items()},
            "prompts_tokenized": {str(how): n for how, n in self._tokenized.items()},
            "prompts_verified": {str(result): n for result, n in self._verified.items()},
            "prompts_sent": {str(how): n for how, n in self._sent.items()},
            "engine_questions_failed": self._num_questions_failed,
            "engine_choices": dict(self._choices),
            "answers": dict(self._answers),
            "num_tokens_tokenized": dict(self._num_tokens),
            "render_bytes": self._memory(),
        }


PROMPT_COUNTS = PromptCounts()
"""The counts of this process."""
