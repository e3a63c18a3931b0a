# SPDX-License-Identifier: Apache-2.0
"""The detokenizer decodes the whole prompt when the first token arrives."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, Any], Any]] = Hook("detokenizer-prompt")
"""Gets the tokenizer and the EngineCoreRequest; returns the one whose prompt primes it."""


def _wrap(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, tokenizer: Any, request: Any) -> None:
        fn = hook.fn
        original(self, tokenizer, request if fn is None else fn(tokenizer, request))

    return __init__


PATCH = Patch(
    name="detokenizer-prompt",
    target="vllm.v1.engine.detokenizer:FastIncrementalDetokenizer.__init__",
    wrap=_wrap,
    symptom="The first token of a 100k-token prompt blocks the API server's event loop for 32 "
    "ms: every other stream stalls.",
    reason="`DecodeStream` is primed with all prompt token ids and decodes them all at its first "
    "step; the last few dozen would do. The class is chosen by the tokenizer's type.",
    feature="detokenize",
    process="api",
    signature="(self, tokenizer, request)",
    upstream="vllm-0.32/0007-detokenizer-prompt.patch",
    remove_when="vLLM primes its detokenizer with the tail of the prompt.",
)
