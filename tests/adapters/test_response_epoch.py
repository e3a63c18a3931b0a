# SPDX-License-Identifier: Apache-2.0
"""Answers from memory with several API servers: what one did to the model is known to all."""

import pytest
from response_client import STOP, answered, run, two_servers

from vllm_stateful.observe.response_counts import ResponseCounts

pytestmark = pytest.mark.usefixtures("counts")


def test_with_several_servers_answers_are_remembered_once_the_epoch_is_known(
    counts: ResponseCounts,
) -> None:
    async def main() -> None:
        client, _ = two_servers()
        await answered(client, "a", 5)
        await answered(client, "b", 5)
        await client.ask("c")
        assert await client.got() == {"c": [5, STOP]}
        assert client.added == ["a", "b"]
        assert counts.snapshot()["responses"] == {"hit": 1, "joined": 0, "miss": 2, "stored": 1}

    run(main())


@pytest.mark.parametrize("method", ["collective_rpc", "add_lora", "reset_prefix_cache"])
def test_what_another_server_did_to_the_model_is_known_here(method: str) -> None:
    async def main() -> None:
        client, other = two_servers()
        for name in "ab":
            await answered(client, name, 5)
        await other._call_utility_async(method, engine=other.core_engine)
        await client.ask("c")
        assert await client.say("c", 8, last=STOP) == {"c": [8, STOP]}
        await client.ask("d")
        assert await client.got() == {"d": [8, STOP]}
        assert client.added == ["a", "b", "c"]

    run(main())


def test_an_answer_during_which_another_server_changed_the_model_is_not_kept() -> None:
    async def main() -> None:
        client, other = two_servers()
        await answered(client, "a", 5)
        await client.ask("b")
        await client.say("b", 5)
        await other._call_utility_async("collective_rpc", engine=other.core_engine)
        await client.say("b", 6, last=STOP)
        await client.ask("c")
        assert client.added == ["a", "b", "c"]

    run(main())


def test_with_several_servers_nobody_follows_what_began_before() -> None:
    async def main() -> None:
        client, other = two_servers()
        await answered(client, "a", 5)
        changed = {"prompt_token_ids": [7]}
        await client.ask("b", **changed)
        await other._call_utility_async("collective_rpc", engine=other.core_engine)
        await client.ask("c", **changed)
        assert client.added == ["a", "b", "c"]

    run(main())


def test_one_that_leaves_while_the_epoch_is_asked_for_reaches_nobody() -> None:
    async def main() -> None:
        client, _ = two_servers()
        for name in "ab":
            await answered(client, name, 5)
        await client.ask("c")
        await client.abort_requests_async(["c"])
        assert await client.got() == {}
        assert client.added == ["a", "b"]

    run(main())
