# SPDX-License-Identifier: Apache-2.0
"""Misses that a small model over HTTP cannot provoke (`misses.IN_STEPS`), on vLLM's scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from misses import IN_STEPS, Asked, check
from recorded_engine import HISTORY, Engine
from served_engine import Served, serving
from simulated_engine import VOCAB
from simulated_groups import MARKERS, ROLES
from test_offload_steps import forget_free_blocks
from vllm.lora.request import LoRARequest
from vllm.v1.request import RequestStatus

from vllm_stateful.adapters.frontend.identity import salt_of

KEY = "a-key"
SALT = salt_of({"authorization": f"Bearer {KEY}"}, None)
MINE, OTHER = "session-of-mine", "session-of-another"
FIRST_MARK = VOCAB - len(MARKERS)
IM_START, THINK, THINK_END, TOOL_CALL = range(FIRST_MARK, VOCAB)
SYSTEM, USER, ASSISTANT, TOOL = range(FIRST_MARK - len(ROLES), FIRST_MARK)
LONG = [7 * n % 90 for n in range(155)]


class Client:
    """Turns of one key, on an engine of their own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def turn(self, name: str, prompt: list[int], session: str = MINE, **options: object) -> None:
        """One turn to its end."""
        self.begin(name, prompt, session, **options)
        self.engine.run()

    def begin(
        self,
        name: str,
        prompt: list[int],
        session: str = MINE,
        max_tokens: int = 1,
        **options: object,
    ) -> None:
        """One turn that has been scheduled."""
        self.engine.add(
            name, prompt, session_id=session, cache_salt=SALT, max_tokens=max_tokens, **options
        )
        self.engine.step()

    def goes_on(self, name: str = "asked") -> str:
        """The session's next turn, when others have reused what nobody holds."""
        forget_free_blocks(self.engine)
        self.turn(name, [*HISTORY, *self.engine.answer("first"), 1, 2])
        return name


def small(num_blocks: int = 41) -> Client:
    client = Client(Engine(num_blocks=num_blocks))
    client.turn("first", HISTORY)
    return client


CHAT = {
    "system": [IM_START, SYSTEM, *range(10)],
    "user": [IM_START, USER, *range(10, 20)],
    "answer": [IM_START, ASSISTANT],
    "thought": [THINK, *range(20, 26), THINK_END],
    "text": [30, 31],
    "call": [TOOL_CALL, 32, 33, 34],
    "result": [IM_START, TOOL, *range(40, 48)],
    "question": [IM_START, USER, *range(50, 60)],
}


def chat(shared: tuple[str, ...] = (), **changes: list[int]) -> tuple[Client, str]:
    """A conversation with a model whose vocabulary has marks, of which some parts are changed.

    Args:
        shared: parts that another session has as well, as they are after the change.
    """
    client, now = Client(Engine(num_blocks=200, has_markers=True, has_roles=True)), CHAT | changes
    client.turn("first", [token for part in CHAT.values() for token in part])
    if shared:
        client.turn("other", [token for name in shared for token in now[name]], OTHER)
    client.turn("asked", [token for part in now.values() for token in part])
    return client, "asked"


def pressed() -> tuple[Client, str]:
    client = small()
    client.turn("large", LONG, OTHER)
    return client, client.goes_on()


def over_budget() -> tuple[Client, str]:
    client = small()
    for number in range(3):
        client.turn(f"other-{number}", [90 + number, *HISTORY], f"{OTHER}-{number}")
    return client, client.goes_on()


def too_large() -> tuple[Client, str]:
    client = Client(Engine(num_blocks=41))
    client.turn("first", LONG)
    forget_free_blocks(client.engine)
    client.turn("asked", LONG)
    return client, "asked"


def unused() -> tuple[Client, str]:
    client = small()
    client.engine.now = 10_000.0
    client.turn("other", LONG[:20], OTHER)
    return client, client.goes_on()


def preempted(name: str, prompt: list[int], client: Client) -> tuple[Client, str]:
    client.begin(name, prompt, max_tokens=9)
    scheduler = client.engine.scheduler
    request = scheduler.requests[name]
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    client.engine.abort(name)
    client.engine.run()
    return client, client.goes_on()


def second_preempted() -> tuple[Client, str]:
    client = small()
    return preempted("second", [*HISTORY, *client.engine.answer("first"), 1], client)


def first_preempted() -> tuple[Client, str]:
    return preempted("first", HISTORY, Client(Engine(num_blocks=41)))


def failed(name: str, prompt: list[int], client: Client) -> tuple[Client, str]:
    client.begin(name, prompt, max_tokens=9)
    client.engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ERROR)
    client.engine.run()
    return client, client.goes_on()


def second_failed() -> tuple[Client, str]:
    client = small()
    return failed("second", [*HISTORY, *client.engine.answer("first"), 1], client)


def first_failed() -> tuple[Client, str]:
    return failed("first", HISTORY, Client(Engine(num_blocks=41)))


def running_while(event: Callable[[Engine], object]) -> tuple[Client, str]:
    client = Client(Engine(num_blocks=41))
    client.begin("first", HISTORY, max_tokens=9)
    event(client.engine)
    client.engine.run()
    return client, client.goes_on()


def reset() -> tuple[Client, str]:
    return running_while(lambda engine: engine.scheduler.reset_prefix_cache())


def closed() -> tuple[Client, str]:
    asked = {"session_ids": [MINE], "cache_salt": SALT}
    return running_while(lambda engine: engine.scheduler.stateful("close", asked))


def cut_short() -> tuple[Client, str]:
    client = Client(Engine(num_blocks=200, kinds=("state", "full")))
    client.turn("first", LONG[:60], max_tokens=4)
    client.turn("asked", LONG[:41])
    return client, "asked"


def shared_by_another() -> tuple[Client, str]:
    """As agents do that begin with one system message."""
    return chat(("system", "user", "answer", "thought", "text", "call"), text=[31, 30])


def adapted() -> tuple[Client, str]:
    client = small()
    client.turn("asked", HISTORY, lora_request=LoRARequest("adapter", 1, "/adapter"))
    return client, "asked"


def uncached() -> tuple[Client, str]:
    client = small()
    client.turn("asked", HISTORY, skip_reading_prefix_cache=True)
    return client, "asked"


PROVOKED: dict[str, Callable[[], tuple[Client, str]]] = {
    "reasoning, stripped, of a model with marks for it": lambda: chat(thought=[]),
    "a call, of a model with marks for it": lambda: chat(call=[TOOL_CALL, 32, 39, 34]),
    "a result, of a model with marks for it": lambda: chat(result=[IM_START, TOOL, 41, 40]),
    "other turns needed the blocks": pressed,
    "other sessions were kept instead": over_budget,
    "a turn too large to be kept": too_large,
    "a session that was not used for long": unused,
    "a turn that was preempted, and given up": second_preempted,
    "a first turn that was preempted, and given up": first_preempted,
    "a turn that failed": second_failed,
    "a first turn that failed": first_failed,
    "a turn that ran while the cache was reset": reset,
    "a turn that ran while its session was closed": closed,
    "a history cut short, without a resume point there": cut_short,
    "an answer, though another session shares more": shared_by_another,
    "another adapter": adapted,
    "a request not to read the cache": uncached,
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as made:
        yield made


@pytest.mark.parametrize("name", IN_STEPS)
def test_a_miss_is_rightly_explained(
    served: Served, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client, request_id = PROVOKED[name]()
    served.engine = client.engine
    check(name, Asked(served.url, request_id, KEY), capsys)
