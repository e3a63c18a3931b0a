# SPDX-License-Identifier: Apache-2.0
"""Plays a workload to all servers, wave by wave, each server in turn."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from benchmarks.ports import HOST
from benchmarks.serving.agents_load import Turn, Workload
from benchmarks.serving.client import ChatClient, RequestFailedError, encode_body
from benchmarks.serving.recorded import Message
from benchmarks.serving.replay import IDS, MODEL_NAME, Tokens
from benchmarks.serving.servers import Server

REPLAY, LIVE = "replay", "live"
MODES = (REPLAY, LIVE)
"""The model is made to say what was recorded; or it speaks for itself, as long as that."""

PAUSE_S = 1.3  # a CPU worker spins for one second after each request
GENERATED = "vllm:generation_tokens_total"
DRAFTED = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"


@dataclass
class Sample:
    """One turn on one side.

    Attributes:
        turn: From 0.
        is_equal: Whether the answer is the recorded one; live: the one of the first side.
    """

    mode: str
    workload: str
    side: str
    conversation: str
    turn: int
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_answer_tokens: int = 0
    is_equal: bool = True
    error: str = ""


@dataclass(frozen=True)
class Drafts:
    """What a server generated and drafted in one workload."""

    mode: str
    workload: str
    side: str
    num_generated: int
    num_drafted: int
    num_accepted: int


class Player:
    """One workload in one mode.

    Args:
        run: names the run in the system message, so that no two workloads share anything.
    """

    def __init__(
        self, servers: Mapping[str, Server], tokens: Tokens, workload: Workload, mode: str, run: str
    ) -> None:
        self._servers = servers
        self._tokens = tokens
        self._workload = workload
        self._mode = mode
        self._run = f"{run}-{mode}-{workload.name}"
        self._messages: dict[tuple[str, int], list[Message]] = {}

    def play(self) -> Iterator[list[Sample]]:
        """Each wave on all sides; another side is the first each time."""
        sides = list(self._servers)
        for number, wave in enumerate(self._workload.waves):
            first = number % len(sides)
            samples = []
            for side in (*sides[first:], *sides[:first]):
                time.sleep(PAUSE_S)
                samples += self._play_wave(side, wave)
            yield samples

    def _play_wave(self, side: str, wave: Sequence[Turn]) -> list[Sample]:
        with ThreadPoolExecutor(max_workers=len(wave)) as threads:
            return list(threads.map(lambda turn: self._ask(side, turn), wave))

    def _ask(self, side: str, turn: Turn) -> Sample:
        conversation = self._workload.conversations[turn.conversation]
        step = conversation.steps[turn.turn]
        sample = Sample(self._mode, self._workload.name, side, conversation.name, turn.turn)
        system = {
            **conversation.system,
            "content": f"Run {self._run}.\n\n{conversation.system['content']}",
        }
        messages = self._messages.setdefault((side, turn.conversation), [system])
        messages += step.new_messages
        num_tokens = self._tokens.count(step.answer) + 1
        fields = self._tokens.pinned(IDS, step.answer) if self._mode == REPLAY else {}
        session = f"{self._run}-{conversation.name}"
        body = encode_body(MODEL_NAME, messages, num_tokens, session_id=session, **fields)
        answer = step.answer
        try:
            with ChatClient(HOST, self._servers[side].port) as client:
                reply = client.ask(body)
        except (OSError, RequestFailedError) as error:
            sample.error = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            sample.ttft_ms = (reply.first_text_s - reply.sent_s) * 1000
            sample.total_ms = (reply.end_s - reply.sent_s) * 1000
            sample.num_prompt_tokens = reply.num_prompt_tokens
            sample.num_cached_tokens = reply.num_cached_tokens
            sample.num_answer_tokens = reply.num_answer_tokens
            answer = reply.text
        messages.append({"role": "assistant", "content": answer})
        sample.is_equal = not sample.error and answer == self._expected(side, turn)
        return sample

    def _expected(self, side: str, turn: Turn) -> str:
        """What was recorded; live what the first side said, where it has spoken already."""
        if self._mode == REPLAY:
            return self._workload.conversations[turn.conversation].steps[turn.turn].answer
        own = self._messages[side, turn.conversation]
        for other in self._servers:
            said = self._messages.get((other, turn.conversation), [])
            if len(said) >= len(own):
                return said[len(own) - 1]["content"]
        return ""


def drafts_of(server: Server, mode: str, workload: str) -> Drafts:
    """The server's totals so far."""
    found = {GENERATED: 0.0, DRAFTED: 0.0, ACCEPTED: 0.0}
    for name, value in server.metrics().items():
        base = name.partition("{")[0]
        if base in found:
            found[base] += value
    numbers = [int(found[name]) for name in (GENERATED, DRAFTED, ACCEPTED)]
    return Drafts(mode, workload, server.side, *numbers)


def since(before: Drafts, after: Drafts) -> Drafts:
    """What came in between."""
    return replace(
        after,
        num_generated=after.num_generated - before.num_generated,
        num_drafted=after.num_drafted - before.num_drafted,
        num_accepted=after.num_accepted - before.num_accepted,
    )
