# SPDX-License-Identifier: Apache-2.0
"""What the model generated is forgotten; the next turn renders and computes it again."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any], None]] = Hook("finished-answer")
"""Gets the state of a request that was answered to its end (not one that was aborted)."""


def _wrap(original: Callable[..., None]) -> Callable[..., None]:
    def _finish_request(self: Any, req_state: Any) -> None:
        original(self, req_state)
        if (fn := hook.fn) is not None:
            fn(req_state)

    return _finish_request


PATCH = Patch(
    name="finished-answer",
    target="vllm.v1.engine.output_processor:OutputProcessor._finish_request",
    wrap=_wrap,
    symptom="A tool call comes back in the history with other white space in its JSON, hence "
    "other token ids: its KV is useless and it is computed again.",
    reason="The generated ids of every endpoint pass here, before they become text; no plugin "
    "is told that a request has finished.",
    feature="history",
    process="api",
    signature="(self, req_state)",
    upstream="vllm-0.32/0011-finished-answer.patch",
    remove_when="a plugin is told the token ids of each finished request in the API server.",
)
