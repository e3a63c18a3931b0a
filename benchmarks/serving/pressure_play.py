# SPDX-License-Identifier: Apache-2.0
"""Plays a load to one server: sessions and one-shots come when they come, in a thread each."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event
from typing import Any

from benchmarks.ports import HOST
from benchmarks.serving.client import ChatClient, RequestFailedError, encode_body
from benchmarks.serving.pressure_load import ONE_SHOT, Load, OneShot, Session
from benchmarks.serving.recorded import Message
from benchmarks.serving.replay import MODEL_NAME

ONE_SHOT_ANSWER_TOKENS = 8
WARM_UP_TEXTS = ("Hello.", "warm " * 700)

Pin = Callable[[str], dict[str, Any]]
"""The fields of a request that make the model say a text."""


@dataclass
class Sample:
    """One request to one side; where it failed, `error` says how and the rest is zero.

    Attributes:
        who: The session or the one-shot.
        turn: Which request of the session in the run.
        sent_s: Since the beginning of the run.
        ttft_ms: From sending the request to the first event with text.
        num_planned_tokens: Of the prompt as the load has it; 0 for one-shots.
        is_equal: Whether the answer is the pinned one; nothing is pinned in a one-shot.
    """

    side: str
    round: int
    kind: str
    who: str
    turn: int
    sent_s: float
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    num_prompt_tokens: int = 0
    num_planned_tokens: int = 0
    num_cached_tokens: int = 0
    num_answer_tokens: int = 0
    is_equal: bool = True
    error: str = ""

    @property
    def num_computed_tokens(self) -> int:
        return self.num_prompt_tokens - self.num_cached_tokens

    @property
    def end_s(self) -> float:
        return self.sent_s + self.total_ms / 1000


class Player:
    """One run on one side."""

    def __init__(self, side: str, port: int, number: int, load: Load, pin: Pin) -> None:
        self._side = side
        self._port = port
        self._number = number
        self._load = load
        self._pin = pin
        self._start_s = 0.0
        self._stopped = Event()

    def play(self) -> list[Sample]:
        """All requests of the load in the order in which they were sent."""
        clients = [*self._load.sessions, *self._load.one_shots]
        threads = ThreadPoolExecutor(max_workers=len(clients) or 1)
        self._start_s = time.perf_counter()
        futures: list[Future[list[Sample]]] = []
        futures += [threads.submit(self._play_session, s) for s in self._load.sessions]
        futures += [threads.submit(self._play_one_shot, s) for s in self._load.one_shots]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            self._stopped.set()
            threads.shutdown(wait=False)  # when this is ended from outside, nobody waits for them
        samples = [sample for future in futures for sample in future.result()]
        return sorted(samples, key=lambda sample: sample.sent_s)

    def _play_session(self, session: Session) -> list[Sample]:
        """Its turns, each a gap after the answer to the one before; a failed one ends it."""
        samples: list[Sample] = []
        messages: list[Message] = [session.system]
        ready_s = 0.0
        with ChatClient(HOST, self._port) as client:
            for number, turn in enumerate(session.turns, 1):
                if self._waits_until(ready_s + turn.gap_s):
                    break
                messages += turn.new_messages
                body = encode_body(
                    MODEL_NAME,
                    messages,
                    turn.max_tokens,
                    session_id=session.name,
                    **self._pin(turn.answer),
                )
                sample = Sample(self._side, self._number, turn.kind, session.name, number, 0.0)
                sample.num_planned_tokens = turn.num_prompt_tokens
                self._ask(client, body, sample, turn.answer)
                samples.append(sample)
                if sample.error:
                    break
                messages.append({"role": "assistant", "content": turn.answer})
                ready_s = sample.end_s
        return samples

    def _play_one_shot(self, shot: OneShot) -> list[Sample]:
        if self._waits_until(shot.start_s):
            return []
        messages = [{"role": "user", "content": shot.text}]
        body = encode_body(MODEL_NAME, messages, ONE_SHOT_ANSWER_TOKENS)
        sample = Sample(self._side, self._number, ONE_SHOT, shot.name, 1, 0.0)
        with ChatClient(HOST, self._port) as client:
            self._ask(client, body, sample, None)
        return [sample]

    def _waits_until(self, when_s: float) -> bool:
        """Sleep until this time of the run; true when the run was stopped meanwhile."""
        return self._stopped.wait(max(0.0, when_s - self._now_s()))

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s

    def _ask(self, client: ChatClient, body: bytes, sample: Sample, answer: str | None) -> None:
        """Send one request and fill in what came of it."""
        sample.sent_s = self._now_s()
        try:
            reply = client.ask(body)
        except (OSError, RequestFailedError) as error:
            sample.total_ms = (self._now_s() - sample.sent_s) * 1000
            sample.error = f"{type(error).__name__}: {str(error)[:300]}"
            return
        sample.ttft_ms = (reply.first_text_s - reply.sent_s) * 1000
        sample.total_ms = (reply.end_s - reply.sent_s) * 1000
        sample.num_prompt_tokens = reply.num_prompt_tokens
        sample.num_cached_tokens = reply.num_cached_tokens
        sample.num_answer_tokens = reply.num_answer_tokens
        sample.is_equal = answer is None or reply.text == answer


def busy_s(samples: Iterable[Sample]) -> float:
    """For how long at least one request was with the server."""
    total, reached = 0.0, 0.0
    for sample in sorted(samples, key=lambda sample: sample.sent_s):
        total += max(0.0, sample.end_s - max(sample.sent_s, reached))
        reached = max(reached, sample.end_s)
    return total


def num_planned(load: Load) -> int:
    """All requests of a load."""
    return sum(len(session.turns) for session in load.sessions) + len(load.one_shots)


def warm_up(port: int, pin: Pin) -> None:
    """Let a server meet what its first requests need; the cache is reset behind it.

    Raises:
        RequestFailedError: a request failed, or its pinned answer did not come.
    """
    answer = "This is what the model is made to say."
    with ChatClient(HOST, port) as client:
        for text in WARM_UP_TEXTS:
            messages = [{"role": "user", "content": text}]
            body = encode_body(MODEL_NAME, messages, 64, **pin(answer))
            said = client.ask(body).text
            if said != answer:
                raise RequestFailedError(f"pinned to {answer!r}, the model said {said!r}")
