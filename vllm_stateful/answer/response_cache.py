# SPDX-License-Identifier: Apache-2.0
"""A cache of whole answers by their request, and the requests that are being answered right now.

An answer is kept step by step, as the engine gave it, so it is given again in the same steps. A
request equal to one in flight follows that one: with its next step it gets all steps before it,
too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

StepT = TypeVar("StepT")

KEY_BYTES = 128
"""Bytes that an answer takes beside its steps: for its key, and for its entry in the table."""


@dataclass(frozen=True)
class Answer(Generic[StepT]):
    """All steps of a finished answer, the key of its request, and the memory of the steps."""

    key: bytes
    steps: tuple[StepT, ...]
    num_bytes: int


class ResponseCache(Generic[StepT]):
    """Answers, bounded in bytes. The one that was used longest ago goes first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._answers: OrderedDict[bytes, Answer[StepT]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: bytes) -> Answer[StepT] | None:
        """The answer to a request; None when it is not known."""
        found = self._answers.get(key)
        if found is not None:
            self._answers.move_to_end(key)
        return found

    def put(self, answer: Answer[StepT]) -> bool:
        """Keep an answer, which replaces an older one with its key. False if it is too large."""
        key = answer.key
        self._drop(key)
        size = answer.num_bytes + KEY_BYTES
        if size > self._max_bytes:
            return False
        self._answers[key] = answer
        self.num_bytes += size
        while self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._answers)))
        return True

    def clear(self) -> None:
        """Forget all answers."""
        self._answers.clear()
        self.num_bytes = 0

    def _drop(self, key: bytes) -> None:
        answer = self._answers.pop(key, None)
        if answer is not None:
            self.num_bytes -= answer.num_bytes + KEY_BYTES


@dataclass(eq=False)
class Flight(Generic[StepT]):
    """A request at the engine, and other requests that wait for the same answer.

    Attributes:
        key: the key of what the requests ask.
        leader: the request that the engine knows.
        is_led: whether the leader's client still waits for the answer.
        is_kept: whether the answer may be kept.
        followers: the other requests, each with the number of steps that it was given.
        steps: the steps of the answer so far.
        num_bytes: the memory of the steps so far.
        epoch: the owner's number of the state that the model was in when the request began.
    """

    key: bytes
    leader: str
    is_kept: bool = True
    is_led: bool = True
    followers: dict[str, int] = field(default_factory=dict)
    steps: list[StepT] = field(default_factory=list)
    num_bytes: int = 0
    epoch: int | None = None

    def give(self) -> Iterator[tuple[str, int, StepT]]:
        """Yield all steps that followers have not got: the follower, the step's number, the step.

        Followers get steps in no other way, so each gets them in order.
        """
        for follower, given in self.followers.items():
            for number in range(given, len(self.steps)):
                yield follower, number, self.steps[number]
            self.followers[follower] = len(self.steps)


class Flights(Generic[StepT]):
    """The requests in flight, by key and by request id. Not thread-safe."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, Flight[StepT]] = {}
        self._by_leader: dict[str, Flight[StepT]] = {}
        self._by_follower: dict[str, Flight[StepT]] = {}

    def __len__(self) -> int:
        return len(self._by_leader)

    def led_by(self, request_id: str) -> Flight[StepT] | None:
        """The flight that a request leads; None when it leads none."""
        return self._by_leader.get(request_id)

    def begin(self, key: bytes, leader: str, *, is_kept: bool = True) -> Flight[StepT]:
        """Begin a flight for a request that goes to the engine. Equal requests may follow it.

        If another flight with this key is there already, requests go on following that one.
        """
        flight: Flight[StepT] = Flight(key, leader, is_kept)
        self._by_leader[leader] = flight
        self._by_key.setdefault(key, flight)
        return flight

    def join(self, key: bytes, follower: str) -> Flight[StepT] | None:
        """Follow the flight with this key; None when there is none."""
        flight = self._by_key.get(key)
        if flight is not None:
            flight.followers[follower] = 0
            self._by_follower[follower] = flight
        return flight

    def came(self, request_id: str, step: StepT, num_bytes: int) -> Flight[StepT] | None:
        """Add a step to the answer of a request.

        Returns:
            The flight whose followers must get the step, too; None when the request leads none.
        """
        flight = self._by_leader.get(request_id)
        if flight is not None:
            flight.steps.append(step)
            flight.num_bytes += num_bytes
        return flight

    def ends(self, flight: Flight[StepT]) -> Answer[StepT]:
        """End a flight, and return its answer."""
        del self._by_leader[flight.leader]
        if self._by_key.get(flight.key) is flight:
            del self._by_key[flight.key]
        for follower in flight.followers:
            self._by_follower.pop(follower, None)
        return Answer(flight.key, tuple(flight.steps), flight.num_bytes)

    def leaves(self, request_id: str) -> str | None:
        """Record that nobody waits for a request any more.

        Returns:
            The request that the engine can abort; None when it has to go on, or when the request is
            in no flight.
        """
        flight = self._by_follower.pop(request_id, None)
        if flight is not None:
            del flight.followers[request_id]
        else:
            flight = self._by_leader.get(request_id)
            if flight is None:
                return None
            flight.is_led = False
        if flight.is_led or flight.followers:
            return None
        self.ends(flight)
        return flight.leader

    def of(self, request_id: str) -> Flight[StepT] | None:
        """The flight that a request leads or follows."""
        return self._by_follower.get(request_id) or self._by_leader.get(request_id)

    def forget(self) -> None:
        """Let no request follow a present flight, and keep none of their answers.

        For when the same request may get another answer from now on. Followers that have joined
        stay.
        """
        self._by_key.clear()
        for flight in self._by_leader.values():
            flight.is_kept = False
