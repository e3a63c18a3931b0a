# SPDX-License-Identifier: Apache-2.0
"""The renderer in vLLM's registry, over the real tokenizer: the same ids as stock, by less work."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import cached_tokenizer_from_config

from benchmarks.models import CACHE
from vllm_stateful.adapters import activation
from vllm_stateful.adapters.frontend import renderer, turn_context
from vllm_stateful.adapters.frontend.renderer import StatefulHfRenderer
from vllm_stateful.observe.prompt_counts import PROMPT_COUNTS, PromptCounts
from vllm_stateful.transport.prompt_ids import PromptTokenIds

MODEL = CACHE / "tiny-llama"
pytestmark = pytest.mark.skipif(
    not (MODEL / "config.json").exists(), reason="the tiny model is not built (make model)"
)
DATA = Path(__file__).parents[1] / "data" / "conversations.jsonl"


def recorded() -> list[list[dict[str, str]]]:
    """Recorded messages; the answers stand in for what a model would say."""
    conversations = []
    for row in map(json.loads, DATA.read_text().splitlines()):
        messages = [{"role": "system", "content": row["system"]}]
        for turn in row["turns"]:
            messages += [{"role": m["role"], "content": m["content"]} for m in turn]
            messages.append({"role": "assistant", "content": "I see. <|im_ \n\n Next."})
        conversations.append(messages)
    return conversations


CHAT = ChatParams(chat_template_kwargs={"tokenize": False, "add_generation_prompt": True})
PARAMS = TokenizeParams(max_total_tokens=16384, add_special_tokens=False)


@pytest.fixture(scope="module")
def config() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        return EngineArgs(model=str(MODEL), dtype="float32").create_engine_config()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> PromptCounts:
    fresh = PromptCounts()
    monkeypatch.setattr(renderer, "PROMPT_COUNTS", fresh)
    return fresh


@pytest.fixture(autouse=True)
def _verify_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_VERIFY_TOKENS", "1")


def make(config: Any, of: type[HfRenderer] = StatefulHfRenderer) -> Any:
    return of(config, cached_tokenizer_from_config(config.model_config))


def ids_of(made: Any, text: str, params: TokenizeParams = PARAMS) -> list[int]:
    (prompt,) = asyncio.run(made.tokenize_prompts_async([{"prompt": text}], params))
    return prompt["prompt_token_ids"]  # type: ignore[no-any-return]


def long_text(turns: int) -> str:
    body = "All work and no play makes Jack a dull boy. 123 <|im_st \t\n" * 20
    return "".join(f"<|im_start|>user\n{body}{i}<|im_end|>\n" for i in range(turns))


def test_every_turn_of_recorded_conversations_has_the_ids_of_stock(
    config: Any, counts: PromptCounts
) -> None:
    stock, ours = make(config, HfRenderer), make(config)
    num_turns = 0
    for messages in recorded():
        for end in range(1, len(messages) + 1):
            turn = messages[:end]

            async def render(one: Any, turn: Any = turn) -> Any:
                _, (prompt,) = await one.render_chat_async([turn], CHAT, PARAMS)
                return prompt

            expected, found = asyncio.run(render(stock)), asyncio.run(render(ours))
            assert list(found["prompt_token_ids"]) == expected["prompt_token_ids"]
            assert found["prompt"] == expected["prompt"]
            num_turns += 1
    ours._verifier.shutdown(wait=True)
    assert counts.snapshot()["prompts_verified"]["different"] == 0
    tokenized = counts.snapshot()["prompts_tokenized"]
    assert sum(tokenized.values()) == num_turns
    assert tokenized["incremental"] > num_turns / 2


def test_a_prompt_is_checked_in_the_background(config: Any, counts: PromptCounts) -> None:
    ours = make(config)
    for turns in (3, 4):
        ids_of(ours, long_text(turns))
    ours._verifier.shutdown(wait=True)
    assert counts.snapshot()["prompts_verified"] == {"equal": 1, "different": 0}


def test_one_difference_turns_it_off(
    config: Any, counts: PromptCounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make(config)
    ids_of(ours, long_text(3))
    tokenize = type(ours._incremental).tokenize

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids = tokenize(self, *args, **kwargs)
        ids[-1] += 1
        return ids

    monkeypatch.setattr(type(ours._incremental), "tokenize", wrong)
    ids_of(ours, long_text(4))
    ours._verifier.shutdown(wait=True)
    assert counts.snapshot()["prompts_verified"] == {"equal": 0, "different": 1}
    ids = ids_of(ours, long_text(5))
    assert not isinstance(ids, PromptTokenIds)
    assert ids == ids_of(make(config, HfRenderer), long_text(5))


def test_tenants_and_salts_never_share(config: Any) -> None:
    ours = make(config)

    async def ask(tenant: str, salt: str | None) -> PromptTokenIds:
        turn_context.begin(tenant, None)
        extras = {} if salt is None else {"cache_salt": salt}
        prompts = [{"prompt": long_text(4)}]
        (prompt,) = await ours.render_cmpl_async(prompts, PARAMS, prompt_extras=extras)
        return prompt["prompt_token_ids"]  # type: ignore[no-any-return]

    whose = [("a", None), ("b", None), ("a", "salt"), ("b", "salt")]
    for tenant, salt in whose:
        assert asyncio.run(ask(tenant, salt)).num_parent_tokens == 0
    for tenant, salt in whose:
        assert asyncio.run(ask(tenant, salt)).num_parent_tokens > 0


@pytest.mark.parametrize(
    "params",
    [
        TokenizeParams(max_total_tokens=16384, truncate_prompt_tokens=50),
        TokenizeParams(max_total_tokens=16384, do_lower_case=True),
        TokenizeParams(max_total_tokens=16384, return_token_offsets=True),
    ],
)
def test_what_is_not_plain_goes_to_stock(config: Any, params: TokenizeParams) -> None:
    ours = make(config)
    ids_of(ours, long_text(3))
    ids = ids_of(ours, long_text(4), params)
    assert not isinstance(ids, PromptTokenIds)
    assert ids == ids_of(make(config, HfRenderer), long_text(4), params)


def test_a_prompt_that_is_too_long_fails_as_in_stock(config: Any) -> None:
    ours, stock = make(config), make(config, HfRenderer)
    params = TokenizeParams(max_total_tokens=1000, add_special_tokens=False)
    ids_of(ours, long_text(2), params)
    errors = []
    for one in (ours, stock):
        with pytest.raises(VLLMValidationError) as caught:
            ids_of(one, long_text(9), params)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_its_own_ids_are_not_validated_again(config: Any) -> None:
    ours = make(config)
    ours.validate_token_ids(PromptTokenIds([10**9]))
    with pytest.raises(VLLMValidationError, match="out of vocabulary"):
        ours.validate_token_ids([10**9])


@pytest.mark.parametrize("disabled", ["tokenize", "tokenize,detokenize"])
def test_it_can_be_disabled(config: Any, disabled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_DISABLE", disabled)
    ours = make(config)
    assert not isinstance(ids_of(ours, long_text(3)), PromptTokenIds)


class TestRegistry:
    @pytest.fixture(autouse=True)
    def _restore(self) -> Iterator[None]:
        before = dict(RENDERER_REGISTRY.renderers)
        yield
        RENDERER_REGISTRY.renderers.clear()
        RENDERER_REGISTRY.renderers.update(before)

    def test_ours_takes_the_place_of_stock_without_a_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        RENDERER_REGISTRY.renderers["hf"] = ("vllm.renderers.hf", "HfRenderer")
        for _ in range(2):
            activation._register_renderer()
        assert RENDERER_REGISTRY.load_renderer_cls("hf") is StatefulHfRenderer
        assert not caplog.records

    def test_another_plugins_renderer_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []
        monkeypatch.setattr(activation, "report_problem", said.append)
        RENDERER_REGISTRY.renderers["hf"] = ("other", "Renderer")
        activation._register_renderer()
        assert RENDERER_REGISTRY.renderers["hf"] == ("other", "Renderer")
        assert len(said) == 1


def test_the_counts_of_the_process_are_these() -> None:
    assert set(PROMPT_COUNTS.snapshot()) >= {"prompts_tokenized", "prompts_sent", "render_bytes"}
