# SPDX-License-Identifier: Apache-2.0
"""Images, audio and video as part of the identity of a prompt's tokens.

In vLLM's prompt each item is a run of the same placeholder token, whatever it shows. For matching,
each run gets ids that are computed from its content. Two prompts then share the run exactly if they
show the same, and a conversation with a screenshot in one turn resumes in the next. The ids are
negative, so none of them is a token of a vocabulary. They never reach a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_stateful.types import TokenArray

MIN_PLACEHOLDERS = 4
"""The fewest placeholders of an item that can be told apart: each gives 31 bits."""


def can_be_named(features: Sequence[Any]) -> bool:
    """Whether every item has enough placeholders to be told apart from any other.

    Args:
        features: vLLM's ``MultiModalFeatureSpec`` of a request.
    """
    return all(feature.mm_position.length >= MIN_PLACEHOLDERS for feature in features)


def with_features(token_ids: TokenArray, features: Sequence[Any]) -> TokenArray:
    """A copy of a prompt in which everything that is not text has ids of its own.

    Args:
        token_ids: the prompt, shape ``[num_tokens]``.
        features: vLLM's ``MultiModalFeatureSpec`` of the request. ``identifier`` is the hash of the
            content, and of the adapter where vLLM includes it.
    """
    named = token_ids.copy()
    for feature in features:
        first, length = feature.mm_position.offset, feature.mm_position.length
        name = f"{feature.modality}\0{feature.identifier}\0{length}".encode()
        bits = np.frombuffer(hashlib.shake_128(name).digest(4 * length), np.int32)
        named[first : first + length] = bits | np.int32(-(2**31))
    return named
