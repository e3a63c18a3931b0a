# SPDX-License-Identifier: Apache-2.0
"""The patch where the state of a request is made, on the installed vLLM: see `test_patched.py`."""

import importlib.util
from functools import partial
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import RequestState

from vllm_stateful.compat.ledger import patch_of

pytestmark = pytest.mark.usefixtures("stock_vllm")


def request() -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="r-1",
        external_req_id="r",
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None,
        arrival_time=1.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def state_of(made: EngineCoreRequest) -> RequestState:
    return RequestState.from_new_request(None, made, "prompt", None, 0, None, False, 1)


class Named(RequestState):  # type: ignore[misc]
    def __init__(self, name: str, **fields: Any) -> None:
        super().__init__(**fields)
        self.name = name


def test_request_state_hook_says_what_makes_the_state() -> None:
    stock = vars(state_of(request()))
    patch_of("request-state").apply()
    assert vars(state_of(request())).keys() == stock.keys()
    seen = []

    def choose(cls: Any, made: Any) -> Any:
        seen.append((cls, made))
        return partial(Named, "mine")

    patch_of("request-state").calls[0].set(choose)
    made = request()
    state = state_of(made)
    assert seen == [(RequestState, made)]
    assert isinstance(state, Named)
    assert (state.name, state.prompt, state.prompt_len) == ("mine", "prompt", 2)
    assert vars(state).keys() == stock.keys() | {"name"}


def test_stock_knows_stop_strings_only_from_the_request() -> None:
    assert not hasattr(RequestState, "factory")
    assert type(state_of(request())) is RequestState
