# SPDX-License-Identifier: Apache-2.0
"""Chooses the scheduler of an engine core. Ours is imported only where it fits."""

from __future__ import annotations

from vllm_stateful.adapters.fit import is_fit, report_problem


def choose_scheduler(stock: type) -> type:
    """Hook of ``scheduler-class``: our counterpart of the class that vLLM chose, or that class."""
    if not is_fit("sessions", "engine"):
        return stock
    from vllm_stateful.adapters.engine.scheduler import stateful_scheduler_class

    chosen = stateful_scheduler_class(stock)
    if chosen is None:
        report_problem(f"the scheduler is {stock.__module__}.{stock.__qualname__} (scheduler_cls)")
        return stock
    return chosen
