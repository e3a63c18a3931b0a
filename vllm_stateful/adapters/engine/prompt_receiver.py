# SPDX-License-Identifier: Apache-2.0
"""Engine core: put a prompt together again, and let it inherit what its base had computed.

This runs in the engine's input thread, before the scheduler sees the request. The request that vLLM
builds is an ordinary one with a plain list of token ids. Two things are new about it. The block
hashes of its base are not computed again. And the ids are at hand as an int32 array
(``turn.prompt_array``), for the lookup and for the worker.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable
from importlib.metadata import entry_points
from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.kv_hints import KvHintsEnvelope
from vllm.v1.request import Request

from vllm_stateful.adapters.model_input import identity_of
from vllm_stateful.adapters.slots import on_request
from vllm_stateful.config import process_config
from vllm_stateful.prefix.residency import PromptBase
from vllm_stateful.transport.bases import Base, BaseStore, Prompt
from vllm_stateful.transport.header import ACTION, NO_VERSION, BaseMissError, PromptHeader
from vllm_stateful.transport.wire import BASE_MISS

logger = init_logger("vllm.stateful")

Proceed = Callable[[Any, EngineCoreRequest], tuple[Request, int]]


class PromptReceiver:
    """Holds the bases of one engine core, and a block hasher that uses them."""

    def __init__(self, core: Any) -> None:
        config = process_config()
        vocab_size = core.vllm_config.model_config.get_vocab_size()
        self.bases = BaseStore(config.base_bytes, vocab_size)
        self._hash_block_size = getattr(core.scheduler, "hash_block_size", None)
        self._num_ahead = getattr(core.vllm_config, "num_hash_lookahead_tokens", 0)
        """The number of tokens behind a block that its hash covers, too. It is not 0 with draft
        heads from vLLM 0.33 on."""
        self._stock_hasher = core.request_block_hasher
        self._inherited = threading.local()
        self._max_tokens = core.vllm_config.model_config.max_model_len
        self._workers_take_arrays = _only_vllm_reads_prompts(core)
        if self._stock_hasher is not None and self._hash_block_size:
            core.request_block_hasher = self._hash_blocks

    def receive(self, core: Any, request: EngineCoreRequest, proceed: Proceed) -> Any:
        """Rebuild a labelled prompt, build vLLM's request, and remember the prompt.

        Raises:
            BaseMissError: the base is not here.
            ChecksumError: see ``BaseStore.rebuild``.
            ValueError: the prompt is longer than the model's context.
        """
        header = _take_label(request)
        if header is None:
            return proceed(core, request)
        prompt = self.bases.rebuild(header, request.prompt_token_ids or [])
        if len(prompt.token_ids) > self._max_tokens:
            raise ValueError(f"a prompt of {len(prompt.token_ids)} tokens was put together")
        request.prompt_token_ids = prompt.token_ids
        hash_key = identity_of(request)
        self._inherited.block_hashes = self._inheritance(prompt, hash_key)
        try:
            made, wave = proceed(core, request)
        finally:
            self._inherited.block_hashes = ()
        found = on_request(made)
        found.prompt = prompt.array
        found.version, found.base = _names(header)
        found.is_array_sent = self._workers_take_arrays
        hashes = tuple(made.block_hashes)
        self.bases.keep(header, Base(tuple(prompt.token_ids), prompt.array, hash_key, hashes))
        return made, wave

    def _inheritance(self, prompt: Prompt, hash_key: Any) -> tuple[Any, ...]:
        base = prompt.parent
        if base is None or base.hash_key != hash_key or not self._hash_block_size:
            return ()
        num_tokens = max(0, prompt.num_parent_tokens - self._num_ahead)
        return base.block_hashes[: num_tokens // self._hash_block_size]

    def _hash_blocks(self, request: Request) -> list[Any]:
        """Run vLLM's block hasher from behind the blocks that the base had hashed."""
        inherited = getattr(self._inherited, "block_hashes", ())
        if inherited and not request.block_hashes:
            request.block_hashes.extend(inherited)
        return self._stock_hasher(request)  # type: ignore[no-any-return]


def _only_vllm_reads_prompts(core: Any) -> bool:
    """Whether only vLLM's own code reads the prompts that go to the workers.

    With model runner V2, we patch that code. LongCat's n-gram models read prompts with code of
    their own, which takes only lists.
    """
    config = core.vllm_config
    workers = config.parallel_config
    are_here = workers.distributed_executor_backend in ("uni", "mp") and workers.nnodes == 1
    return (
        (are_here or not config.use_v2_model_runner)
        and getattr(core.scheduler, "connector", None) is None
        and not config.model_config.logits_processors
        and not any("Ngram" in name for name in config.model_config.architectures)
        and not entry_points(group="vllm.logits_processors")
    )


def _take_label(request: EngineCoreRequest) -> PromptHeader | None:
    """Take the header off a request; its other hints stay."""
    hints = request.kv_hints
    if hints is None:
        return None
    labels = [action for action in hints.actions if action.action_type == ACTION]
    if not labels:
        return None
    others = [action for action in hints.actions if action.action_type != ACTION]
    request.kv_hints = (
        KvHintsEnvelope(hints.protocol_version, hints.message_id, others) if others else None
    )
    return PromptHeader.from_payload(labels[0].payload)


def _names(header: PromptHeader) -> tuple[Hashable, PromptBase | None]:
    """The name of this prompt for later prompts, and the base to which it refers itself."""
    version = None if header.version == NO_VERSION else (header.client, header.version)
    if header.parent == NO_VERSION:
        return version, None
    return version, PromptBase((header.client, header.parent), header.num_parent_tokens)


def receive(core: Any, request: EngineCoreRequest, proceed: Proceed) -> Any:
    """Hook of ``prompt-handover``: does what ``EngineCore.preprocess_add_request`` does."""
    receiver = getattr(core, "stateful_receiver", None)
    if receiver is None:
        receiver = core.stateful_receiver = PromptReceiver(core)
    return receiver.receive(core, request, proceed)


def answer_miss(core: Any, request: EngineCoreRequest) -> bool:
    """Hook of ``prompt-miss``: tell the client to send the prompt in full.

    Returns:
        False when the request failed for another reason. vLLM reports that one.
    """
    if not isinstance(sys.exception(), BaseMissError):
        return False
    logger.debug("stateful: no base for request %s, asking for it in full", request.request_id)
    missed = EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=FinishReason.ERROR,
        stop_reason=BASE_MISS,
    )
    # The request has not finished: a client of several engine cores goes on to count it here, and
    # sends an abort, or the whole prompt, to this engine core.
    outputs = EngineCoreOutputs(engine_index=core.engine_index, outputs=[missed])
    core.output_queue.put_nowait((request.client_index, outputs))
    return True
