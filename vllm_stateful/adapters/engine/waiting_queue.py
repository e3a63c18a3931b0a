# SPDX-License-Identifier: Apache-2.0
"""vLLM's queue of waiting requests, ordered by the service of their sessions.

It replaces ``Scheduler.waiting`` with ``--stateful-order least-served``. Requests that hold blocks
while they wait are in ``Scheduler.kv_holding_waiting``. That queue stays vLLM's, and goes first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request, RequestStatus

from vllm_stateful.adapters.engine.turn import session_of
from vllm_stateful.adapters.slots import of_request, on_request
from vllm_stateful.request.session_identity import id_fault
from vllm_stateful.schedule.service_order import ServiceBook, ServiceOrder
from vllm_stateful.types import SessionKey


def named_session_of(request: Request) -> SessionKey | None:
    """The session that a request names; None for a request of its own."""
    return None if id_fault(request.session_id) is not None else session_of(request)


class ServiceQueue(RequestQueue):  # type: ignore[misc]
    """A ``RequestQueue``: preempted requests first, as in stock vLLM, then by service.

    During a step vLLM takes out requests that cannot run yet (they wait for a grammar to compile,
    or for a LoRA slot). It prepends them after the step. They go back to their former place, not
    before all others.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._book = ServiceBook()
        self._order: ServiceOrder[Request] = ServiceOrder(self._book)
        self._preempted: deque[Request] = deque()

    def add_request(self, request: Request) -> None:
        """Enter a request that has arrived."""
        on_request(request).ticket = self._order.add(
            request, named_session_of(request), self._clock()
        )

    def pop_request(self) -> Request:
        """Take the next request: the one that ``peek_request`` gives."""
        if self._preempted:
            return self._preempted.popleft()
        return self._order.pop(self._clock())

    def peek_request(self) -> Request:
        """The next request; raises IndexError when none waits."""
        return self._preempted[0] if self._preempted else self._order.first(self._clock())

    def prepend_request(self, request: Request) -> None:
        """Enter a preempted request before all others; any other goes back to its place."""
        ticket = of_request(request).ticket
        if request.status == RequestStatus.PREEMPTED:
            self._preempted.appendleft(request)
        elif ticket is None:
            self.add_request(request)
        else:
            self._order.put_back(request, ticket)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Prepend each in turn, as vLLM's queue does: the last preempted request goes first."""
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        """Take a request out; raises ValueError when it does not wait."""
        if not self._order.discard(request):
            self._preempted.remove(request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take requests out; those that do not wait are passed over."""
        gone = {request for request in requests if not self._order.discard(request)}
        if gone and self._preempted:
            self._preempted = deque(r for r in self._preempted if r not in gone)

    def __bool__(self) -> bool:
        return bool(self._preempted) or len(self._order) > 0

    def __len__(self) -> int:
        return len(self._preempted) + len(self._order)

    def __iter__(self) -> Iterator[Request]:
        """The requests in the order of ``pop_request``, as if time stood still."""
        return iter([*self._preempted, *self._order.in_order(self._clock())])

    # ---- what the scheduler tells ---------------------------------------------------------

    def admitted(self, request: Request, num_cached: int) -> None:
        """Charge an admitted request's session for the prompt tokens that are not in the cache.

        Tokens that a preempted request computes a second time are not counted.
        """
        if request.num_preemptions == 0:
            self._book.charge(named_session_of(request), request.num_prompt_tokens - num_cached)

    def ended(self, request: Request) -> None:
        """Charge an ended request's session for its output tokens."""
        self._book.charge(named_session_of(request), num_output=request.num_output_tokens)
