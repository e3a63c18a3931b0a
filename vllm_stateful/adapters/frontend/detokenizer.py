# SPDX-License-Identifier: Apache-2.0
"""Primes vLLM's fast detokenizer with the tail of a prompt instead of all of it."""

from __future__ import annotations

import copy
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreRequest

from vllm_stateful.render.decode_tail import MIN_TAIL, Stream, is_decodable_from_tail
from vllm_stateful.render.decode_tail import tail_for_decoding as _tail

logger = init_logger("vllm.stateful")

_tried: dict[int, Tokenizer] = {}
"""The backends that passed the trial, by Python ``id``."""


def try_tail_decoding(tokenizer: Tokenizer) -> None:
    """Find out whether a tokenizer's decoder may be primed with a tail; called at start-up."""

    def make_stream(prompt: Any) -> Stream:
        stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        return lambda token_id: stream.step(tokenizer, token_id)

    vocab_size = tokenizer.get_vocab_size()
    if is_decodable_from_tail(make_stream, tokenizer.decode, tokenizer.id_to_token, vocab_size):
        _tried[id(tokenizer)] = tokenizer
    else:
        logger.warning("stateful: its decoder needs the whole prompt to decode the first token")


def with_prompt_tail(tokenizer: Any, request: EngineCoreRequest) -> EngineCoreRequest:
    """Hook of ``detokenizer-prompt``: the request as the detokenizer needs to see it.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        request: any request; it is not changed.
    """
    ids = request.prompt_token_ids
    backend = tokenizer._tokenizer
    if ids is None or len(ids) <= MIN_TAIL or id(backend) not in _tried:
        return request
    params = request.sampling_params
    assert params is not None

    def decode(token_ids: Any) -> str:
        return str(backend.decode(token_ids, skip_special_tokens=params.skip_special_tokens))

    tail = _tail(ids, decode, backend.id_to_token)
    if len(tail) == len(ids):
        return request
    seen = copy.copy(request)
    seen.prompt_token_ids = tail
    return seen
