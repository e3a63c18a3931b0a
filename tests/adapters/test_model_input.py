# SPDX-License-Identifier: Apache-2.0
"""What tells apart requests with equal tokens, in every key of ours: all that vLLM tells apart."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from prompt_link import prompt, request_of, stock_request
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from vllm_stateful.adapters.engine.turn import session_of
from vllm_stateful.adapters.frontend.response_key import key_of
from vllm_stateful.adapters.frontend.turn_context import CacheControl, TurnContext
from vllm_stateful.adapters.model_input import identity_of

ADAPTER = LoRARequest("ad", 1, "/v1", base_model_name="base")
DIFFERENT = {
    "lora_name": "other",
    "lora_int_id": 2,
    "lora_path": "/v2",
    "base_model_name": "another base",
    "is_3d_lora_weight": True,
}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"lora_request": ADAPTER}, {"lora_request": msgspec.structs.replace(ADAPTER, **{name: value})})
    for name, value in DIFFERENT.items()
]
CASES += [
    ({}, {"lora_request": ADAPTER}),
    ({}, {"cache_salt": "a"}),
    ({"cache_salt": "b"}, {"cache_salt": "a"}),
]


def keys(fields: dict[str, Any]) -> list[Any]:
    """Identity, session and response key of one request."""
    greedy = SamplingParams(temperature=0.0, max_tokens=4)
    request = request_of(
        prompt(40, 1), session_id="a session of mine", sampling_params=greedy, **fields
    )
    answer = key_of(request, TurnContext(cache_control=CacheControl(True, is_looked_up=True)))
    assert isinstance(answer, bytes)
    return [identity_of(request), session_of(stock_request(request)), answer]


@pytest.mark.parametrize(("one", "another"), CASES)
def test_what_differs_in_any_has_other_keys(one: dict[str, Any], another: dict[str, Any]) -> None:
    for first, second in zip(keys(one), keys(another), strict=True):
        assert first != second


def test_every_field_of_an_adapter_is_looked_at() -> None:
    assert set(DIFFERENT) | {"load_inplace"} == set(LoRARequest.__struct_fields__)


def test_how_an_adapter_was_loaded_is_no_part_of_it() -> None:
    again = msgspec.structs.replace(ADAPTER, load_inplace=True)
    assert keys({"lora_request": ADAPTER}) == keys({"lora_request": again})


def test_engine_and_client_agree() -> None:
    for fields in ({}, {"lora_request": ADAPTER, "cache_salt": "a"}):
        request = request_of(prompt(40, 1), **fields)
        assert identity_of(request) == identity_of(stock_request(request))
