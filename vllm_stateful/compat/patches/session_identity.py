# SPDX-License-Identifier: Apache-2.0
"""Session ids that agents send under other names than vLLM reads."""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch

hook: Hook[Callable[[Any, Any | None, str | None], str | None]] = Hook("session-identity")
"""Gets the parsed request, the raw HTTP request (may be None) and the id vLLM found; returns
the id to use. Runs once per request in the API server, before the prompt reaches the engine."""


def _wrap(original: Callable[[Any, Any], str | None]) -> Callable[[Any, Any], str | None]:
    def _get_session_id(request: Any, raw_request: Any) -> str | None:
        stock = original(request, raw_request)
        return stock if (fn := hook.fn) is None else fn(request, raw_request, stock)

    return _get_session_id


PATCH = Patch(
    name="session-identity",
    target="vllm.entrypoints.generate.base.serving:GenerateBaseServing._get_session_id",
    wrap=_wrap,
    symptom="Only `session_id`, `X-Session-ID` and `vllm_xargs.session_id` name a session; "
    "agents send other headers and are taken for strangers at every turn.",
    reason="Chat, completions and responses all ask this one function, and no seam lets a plugin "
    "answer; a middleware could only rewrite headers, without seeing the parsed body.",
    feature="sessions",
    process="api",
    signature="(request, raw_request)",
    upstream="vllm-0.32/0003-session-identity.patch",
    remove_when="a plugin can register where a session id comes from.",
)
