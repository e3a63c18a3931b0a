# SPDX-License-Identifier: Apache-2.0
"""Images as part of the identity of a prompt."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_stateful.adapters.engine.mm_tokens import can_be_named, with_features
from vllm_stateful.adapters.engine.turn import start_turn
from vllm_stateful.prefix.radix_tree import common_prefix_len

PLACEHOLDER = 7
TEXT = np.array([1, 2, 3, *[PLACEHOLDER] * 8, 4, 5, *[PLACEHOLDER] * 6, 6], np.int32)


def image(name: str, offset: int, length: int, modality: str = "image") -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(None, modality, name, PlaceholderRange(offset, length))


def named(*features: MultiModalFeatureSpec) -> Any:
    return with_features(TEXT, features)


def test_text_stays_and_what_is_no_text_is_no_token() -> None:
    made = named(image("cat", 3, 8), image("dog", 13, 6))
    is_text = TEXT != PLACEHOLDER
    assert (made[is_text] == TEXT[is_text]).all()
    assert (made[~is_text] < 0).all()
    assert (TEXT[~is_text] == PLACEHOLDER).all()


def test_two_prompts_share_what_shows_the_same() -> None:
    one = named(image("cat", 3, 8), image("dog", 13, 6))
    assert common_prefix_len(one, named(image("cat", 3, 8), image("cow", 13, 6))) == 13
    assert common_prefix_len(one, named(image("cow", 3, 8), image("dog", 13, 6))) == 3
    assert common_prefix_len(one, named(image("cat", 3, 8), image("dog", 13, 6))) == len(TEXT)


@pytest.mark.parametrize("other", [image("cat", 3, 8, "audio"), image("cat", 3, 7)])
def test_another_kind_or_size_is_something_else(other: MultiModalFeatureSpec) -> None:
    assert common_prefix_len(named(image("cat", 3, 8)), named(other)) == 3


def test_an_item_of_few_tokens_cannot_be_named() -> None:
    assert can_be_named([image("cat", 3, 8)])
    assert not can_be_named([image("cat", 3, 8), image("dog", 13, 3)])


def test_a_turn_keeps_the_ids_that_the_model_gets() -> None:
    request = SimpleNamespace(
        request_id="one",
        prompt_token_ids=TEXT.tolist(),
        mm_features=[image("cat", 3, 8)],
        session_id="session-one",
        cache_salt=None,
        lora_request=None,
        prompt_embeds=None,
        kv_hints=None,
        stateful_prompt_names=("version", "base"),
    )
    turn = start_turn(request)  # type: ignore[arg-type]
    assert (turn.token_ids == TEXT).all()
    assert (turn.prompt[3:11] < 0).all()
    assert (turn.version, turn.prompt_base) == (None, None)
