# SPDX-License-Identifier: Apache-2.0
"""API process: follows the tool calls in a turn's text, and ends the turn where they say so.

The check uses vLLM's own stop strings: our detokenizer returns one, and vLLM finishes the turn and
aborts it in the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer
from vllm.v1.engine.output_processor import RequestState

from vllm_stateful.adapters.frontend.tool_call_plan import mode
from vllm_stateful.adapters.frontend.turn_context import plan_of_request
from vllm_stateful.answer.tool_call_stream import COMPLETE, ToolCallStream, Verdict
from vllm_stateful.observe.tool_call_counts import TOOL_CALL_COUNTS

logger = init_logger("vllm.stateful")


def state_maker(stock: type[RequestState], request: EngineCoreRequest) -> Callable[..., Any]:
    """Hook of ``request-state``: what makes the state of a request: a class or a function."""
    plan = plan_of_request(request.external_req_id)
    if plan is None or request.resumable:
        return stock
    calls = plan.stream(strict=mode() == "strict", reasoning_ended=bool(request.reasoning_ended))
    return partial(CheckedRequestState, calls)


class CheckedRequestState(RequestState):  # type: ignore[misc]
    """The state of a request whose tool calls are followed."""

    detokenizer: Any

    def __init__(self, calls: ToolCallStream, **fields: Any) -> None:
        super().__init__(**fields)
        self._calls = calls
        if isinstance(self.detokenizer, BaseIncrementalDetokenizer):
            self.detokenizer = CheckedDetokenizer(self.detokenizer, calls)

    def make_request_output(
        self,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: int | str | None,
        *others: Any,
        **fields: Any,
    ) -> Any:
        """Do as vLLM does; a turn ended behind its last call looks as if the model had ended it."""
        if finish_reason is not None:
            self._calls.finish()
            TOOL_CALL_COUNTS.checked(self._calls.results)
            TOOL_CALL_COUNTS.unchecked(self._calls.unchecked)
        reason = None if stop_reason == COMPLETE else stop_reason
        return super().make_request_output(
            new_token_ids, pooling_output, finish_reason, reason, *others, **fields
        )


class CheckedDetokenizer:
    """vLLM's detokenizer of one answer, with verdicts on its tool calls as stop strings.

    Args:
        stock: vLLM's detokenizer.
        calls: follows the tool calls in its text.
    """

    def __init__(self, stock: BaseIncrementalDetokenizer, calls: ToolCallStream) -> None:
        self._stock = stock
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        """Decode, and check the text token by token; tokens behind the end are dropped.

        Returns:
            The stop string that was found, or the reason why the turn ends.
        """
        last = len(new_token_ids) - 1
        for place, token_id in enumerate(new_token_ids):
            stop: str | None = self._stock.update([token_id], stop_terminated and place == last)
            if stop is not None:
                return stop
            verdict = self._look()
            if verdict is not None:
                self._stock.output_text = self._stock.output_text[: verdict.end]
                TOOL_CALL_COUNTS.ended("complete" if verdict.reason == COMPLETE else "invalid")
                return verdict.reason
        return None

    def _look(self) -> Verdict | None:
        """Check the text; never fails, since an error here would end all requests of the server."""
        try:
            return self._calls.look(self._stock.output_text)
        except Exception:
            logger.exception("stateful: the tool calls of an answer cannot be checked")
            self._calls.give_up()
            return None
