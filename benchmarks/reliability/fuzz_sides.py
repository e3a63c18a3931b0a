# SPDX-License-Identifier: Apache-2.0
"""Both servers, and what they answer to the same request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.reliability.fuzz_answers import (
    Answer,
    Case,
    Request,
    ask,
    is_allowed,
    places,
    same_answers,
)
from benchmarks.serving.servers import PLUGIN, SIDES, STOCK, Server, Settings

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".cache" / "models" / "tiny-llama"
NAME = "tiny"
MAX_MODEL_LEN = 2048
NO_CACHE = ("Cache-Control", "no-cache")

SETTINGS = Settings(
    model_name=NAME,
    max_model_len=MAX_MODEL_LEN,
    kv_gib=1,
    arguments=(
        *("--chat-template", str(ROOT / "benchmarks" / "models" / "smollm2_tools.jinja")),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        # So that a request whose limit was lost ends soon, and is still greedy.
        *("--override-generation-config", '{"temperature": 0, "max_new_tokens": 16}'),
    ),
    environment={"VLLM_ENABLE_RESPONSES_API_STORE": "1"},
    side_arguments={
        PLUGIN: (
            *("--plugin", "stateful", "--stateful-strict", "--stateful-check-invariants"),
            *("--stateful-response-cache-bytes", "16M"),
        )
    },
)


@dataclass(frozen=True)
class Difference:
    """A request that the sides answer otherwise.

    Attributes:
        turn: which sending of the case it was.
    """

    name: str
    turn: int
    requests: Mapping[str, Request]
    answers: Mapping[str, Answer]

    def as_json(self) -> dict[str, Any]:
        """One line of the report."""
        sent = self.requests[PLUGIN]
        headers = {name: _text(value) for name, value in sent.headers}
        return {
            "case": self.name,
            "turn": self.turn,
            "method": sent.method,
            "path": sent.path,
            "headers": headers,
            "body": _text(sent.body),
            "places": places(*(self.answers[side].as_json() for side in SIDES)),
            **{side: answer.as_json() for side, answer in self.answers.items()},
        }


class Sides:
    """Two running servers.

    Attributes:
        num_requests: that each of them got.
        unstable: cases to which stock vLLM itself answers this and that.
    """

    def __init__(self, servers: Mapping[str, Server]) -> None:
        self._servers = servers
        self._pool = ThreadPoolExecutor(len(SIDES))
        self.num_requests = 0
        self.unstable: list[str] = []

    def play(self, case: Case, *, is_cached: bool = True) -> Difference | None:
        """Send a case twice, then its next turn where it has one.

        Args:
            is_cached: whether the second may be answered without the model.
        """
        more = () if is_cached else (NO_CACHE,)
        for turn, extra in enumerate(((), more)):
            found = self._compare(case, turn, dict.fromkeys(SIDES, case.request(*extra)))
            if isinstance(found, Difference):
                return found
            if any(answer.status != 200 for answer in found.values()):
                return None  # nothing is remembered of it
        if case.then is None:
            return None
        bodies = {side: case.then(case.body, json.loads(found[side].raw)) for side in SIDES}
        last = self._compare(case, 2, {side: case.with_body(bodies[side]) for side in SIDES})
        return last if isinstance(last, Difference) else None

    def differs(self, case: Case) -> bool:
        """Whether both sides answer a case otherwise, sent once."""
        answers = self._ask(dict.fromkeys(SIDES, case.request()))
        return not self._agree(case.request(), answers)

    def check_alive(self) -> None:
        """Raise, with the end of its log, when a server has ended."""
        for server in self._servers.values():
            server.check_alive()

    def faults_in_log(self) -> list[str]:
        """What the plugin itself says about answers that were not those of stock vLLM."""
        lines = self._servers[PLUGIN].log.read_text(errors="replace").splitlines()
        signs = ("MISMATCH", "invariant", "EngineDeadError")
        return [
            line for line in lines if any(sign in line for sign in signs) and "args" not in line
        ]

    def _compare(
        self, case: Case, turn: int, requests: Mapping[str, Request]
    ) -> Difference | dict[str, Answer]:
        answers = self._ask(requests)
        if self._agree(requests[PLUGIN], answers):
            return answers
        self.check_alive()
        again = ask(self._servers[STOCK].port, requests[STOCK])
        if not same_answers(again, answers[STOCK]):
            self.unstable.append(case.name)
            return answers
        return Difference(case.name, turn, requests, answers)

    def _agree(self, sent: Request, answers: Mapping[str, Answer]) -> bool:
        both = answers[STOCK], answers[PLUGIN]
        return same_answers(*both) or is_allowed(sent, *both)

    def _ask(self, requests: Mapping[str, Request]) -> dict[str, Answer]:
        self.num_requests += 1
        ports = [self._servers[side].port for side in SIDES]
        answers = self._pool.map(ask, ports, [requests[side] for side in SIDES])
        return dict(zip(SIDES, answers, strict=True))


@contextmanager
def running_sides(folder: Path, verified: float = 0) -> Iterator[Sides]:
    """Both servers, started at once.

    Args:
        folder: their logs lie there.
        verified: share of the prompts that the plugin compares with vLLM's own and then takes
            from it. With 0 all answers are its own; with 1 its log tells what it got wrong.
    """
    options = (*SETTINGS.side_arguments[PLUGIN], "--stateful-verify-tokens", str(verified))
    settings = replace(SETTINGS, side_arguments={PLUGIN: options})
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        servers = {
            side: stack.enter_context(
                Server(side, MODEL, folder, is_timed=False, settings=settings)
            )
            for side in SIDES
        }
        for server in servers.values():
            server.wait_until_ready()
        yield Sides(servers)


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")
