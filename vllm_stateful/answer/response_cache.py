# SPDX-License-Identifier: Apache-2.0
"""Whole answers by what was asked, and requests that are being answered right now.

An answer is kept as the engine gave it, step by step, so that it is given again in the same steps.
A request that equals one in flight follows it: with the next step it gets all that came before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

StepT = TypeVar("StepT")

KEY_BYTES = 128
"""What an answer costs beside its steps: its key, and its place in the table."""


@dataclass(frozen=True)
class Answer(Generic[StepT]):
    """All steps of a finished answer, what was asked, and the memory that they take."""

    key: bytes
    steps: tuple[StepT, ...]
    num_bytes: int


class ResponseCache(Generic[StepT]):
    """Answers within a number of bytes; the one that was used longest ago goes first."""

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
        """Keep an answer, in the place of an older one; whether there is room for it."""
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
        """Forget all."""
        self._answers.clear()
        self.num_bytes = 0

    def _drop(self, key: bytes) -> None:
        answer = self._answers.pop(key, None)
        if answer is not None:
            self.num_bytes -= answer.num_bytes + KEY_BYTES


@dataclass(eq=False)
class Flight(Generic[StepT]):
    """A request at the engine, and those that wait for the same answer.

    Attributes:
        leader: the request that the engine knows.
        is_led: whether somebody still waits for the leader's own answer.
        is_kept: whether the answer may be kept.
        followers: those that wait, each with the number of steps that it was given.
        num_bytes: of the steps so far.
        epoch: what its owner knew of the model when it began.
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
        """What each follower has yet to get: its id, the number of the step, and the step.

        This is the only way to them, so none gets a step before those that came earlier.
        """
        for follower, given in self.followers.items():
            for number in range(given, len(self.steps)):
                yield follower, number, self.steps[number]
            self.followers[follower] = len(self.steps)


class Flights(Generic[StepT]):
    """Requests in flight, by what was asked and by their ids. Not thread-safe."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, Flight[StepT]] = {}
        self._by_leader: dict[str, Flight[StepT]] = {}
        self._by_follower: dict[str, Flight[StepT]] = {}

    def __len__(self) -> int:
        return len(self._by_leader)

    def led_by(self, request_id: str) -> Flight[StepT] | None:
        """The flight of a request that the engine knows."""
        return self._by_leader.get(request_id)

    def begin(self, key: bytes, leader: str, *, is_kept: bool = True) -> Flight[StepT]:
        """A request goes to the engine; those that equal it may follow from now on.

        One that is asked for the same at the same time, without following, keeps to itself.
        """
        flight: Flight[StepT] = Flight(key, leader, is_kept)
        self._by_leader[leader] = flight
        self._by_key.setdefault(key, flight)
        return flight

    def join(self, key: bytes, follower: str) -> Flight[StepT] | None:
        """Follow the request that asks for the same; None when there is none."""
        flight = self._by_key.get(key)
        if flight is not None:
            flight.followers[follower] = 0
            self._by_follower[follower] = flight
        return flight

    def came(self, request_id: str, step: StepT, num_bytes: int) -> Flight[StepT] | None:
        """A step of an answer; the flight whose followers are to be given it, too."""
        flight = self._by_leader.get(request_id)
        if flight is not None:
            flight.steps.append(step)
            flight.num_bytes += num_bytes
        return flight

    def ends(self, flight: Flight[StepT]) -> Answer[StepT]:
        """Nothing more will come; the answer is what has come."""
        del self._by_leader[flight.leader]
        if self._by_key.get(flight.key) is flight:
            del self._by_key[flight.key]
        for follower in flight.followers:
            self._by_follower.pop(follower, None)
        return Answer(flight.key, tuple(flight.steps), flight.num_bytes)

    def leaves(self, request_id: str) -> str | None:
        """Nobody waits for a request any more.

        Returns:
            The request that the engine need not go on with; None when it has to go on, or knows
            none.
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
        """The same question may have another answer from now on: nobody follows, nothing is kept.

        Those that follow already go on.
        """
        self._by_key.clear()
        for flight in self._by_leader.values():
            flight.is_kept = False
