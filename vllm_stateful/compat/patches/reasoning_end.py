# SPDX-License-Identifier: Apache-2.0
"""Whether reasoning had ended is looked for through the whole prompt, from its end."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, Any], bool | None]] = Hook("reasoning-end")
"""Gets the reasoning parser and the token ids; returns the answer, or None to search."""


def _wrap(original: Callable[..., bool]) -> Callable[..., bool]:
    def is_reasoning_end(self: Any, input_ids: Any) -> bool:
        known = None if (fn := hook.fn) is None else fn(self, input_ids)
        return original(self, input_ids) if known is None else known

    return is_reasoning_end


PATCH = Patch(
    name="reasoning-end",
    target="vllm.reasoning.basic_parsers:BaseThinkingReasoningParser.is_reasoning_end",
    wrap=_wrap,
    symptom="With a reasoning parser, a Python loop runs backwards over the prompt, on the event "
    "loop: to its start when no thinking token is in it (2 ms for 100k tokens).",
    reason="The parser is given a list of ids and cannot know that all but its end was searched "
    "in the turn before.",
    feature="reasoning",
    process="api",
    signature="(self, input_ids)",
    upstream="vllm-0.32/0010-reasoning-end.patch",
    remove_when="vLLM searches the prompt for thinking tokens only where it is new.",
)
