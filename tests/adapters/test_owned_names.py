# SPDX-License-Identifier: Apache-2.0
"""A name that a client gives to an image is the name of its tenant's image."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.renderers.hf import HfRenderer

from vllm_stateful.adapters.frontend import identity, turn_context
from vllm_stateful.adapters.frontend.renderer import StatefulHfRenderer
from vllm_stateful.adapters.frontend.turn_context import TurnContext


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The names that reach vLLM's multimodal processor, from a tenant with a salt."""
    reached: list[Any] = []

    async def process(self: Any, prompt: Any, **_: Any) -> None:
        reached.append(prompt.get("multi_modal_uuids"))

    monkeypatch.setattr(HfRenderer, "_process_tokens_async", process)
    monkeypatch.setattr(
        HfRenderer, "_process_tokens", lambda _, prompt: reached.append(prompt["multi_modal_uuids"])
    )
    renderer = object.__new__(StatefulHfRenderer)

    def ask(tenant: str, given: Any, salt: str | None = None) -> Any:
        prompt: Any = {"prompt_token_ids": [1], "multi_modal_uuids": given, "cache_salt": salt}
        token = turn_context._current.set(TurnContext(tenant))
        asyncio.run(renderer._process_tokens_async(prompt))
        renderer._process_tokens(prompt)
        turn_context._current.reset(token)
        assert prompt["multi_modal_uuids"] is given
        at_once, behind = reached[-2:]
        assert at_once == behind
        return at_once

    yield ask
    identity.stand_aside(None)


def test_tenants_and_salts_have_names_of_their_own(names: Any) -> None:
    given = {"image": ["shot", None], "audio": "one"}
    made = [names("", given, "s"), *(names(t, given, s) for t in "ab" for s in (None, "s"))]
    assert len({each["image"][0] for each in made} | {each["audio"] for each in made}) == 10
    assert [each["image"][1] for each in made] == [None] * 5
    assert names("a", given) == made[1]


def test_names_without_a_tenant_stay(names: Any) -> None:
    given = {"image": ["shot", None]}
    assert names("", given) == given
    assert names("a", None) is None
    identity.stand_aside("an unsupported model")
    assert names("a", given) == given
