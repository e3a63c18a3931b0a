# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler and KV cache manager without a model: the answers are known beforehand.

Steps are in flight as with vLLM's batch queue: two, where scheduling is asynchronous.
"""

from __future__ import annotations

import json
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

MAX_MODEL_LEN = 262_144
_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "vocab_size": 65_536,
    "max_position_embeddings": MAX_MODEL_LEN,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Shape:
    """The KV cache groups of a family.

    Attributes:
        states: groups of recurrent layers.
        windows: groups of sliding windows.
        window: tokens of one.
        block: tokens of a block, in all groups.
        saves_inside: whether a state inside a chunk can be saved, as vLLM's Mamba 2 layers do.
    """

    states: int = 0
    windows: int = 0
    window: int = 0
    block: int = 16
    saves_inside: bool = False

    def groups(self) -> list[KVCacheGroupSpec]:
        """Those of the other kinds, then one of full attention."""
        sizes: dict[str, Any] = {"block_size": self.block, "num_kv_heads": 1, "head_size": 1}
        sizes["dtype"] = torch.float32
        full = FullAttentionSpec(**sizes)
        state = MambaSpec(
            block_size=self.block,
            shapes=((1,),),
            dtypes=(torch.float32,),
            page_size_padded=full.page_size_bytes,
            mamba_cache_mode="align",
            num_prefill_checkpoint_blocks=int(self.saves_inside),
            prefill_checkpoint_alignment=1 if self.saves_inside else None,
        )
        specs: list[Any] = [state] * self.states
        if self.windows:
            specs += [SlidingWindowSpec(**sizes, sliding_window=self.window)] * self.windows
        specs.append(full)
        return [KVCacheGroupSpec([f"layer.{n}"], spec) for n, spec in enumerate(specs)]


SHAPES: Mapping[str, Shape] = {
    "qwen3-next": Shape(states=3, block=528),
    "nemotron-h": Shape(states=6, block=528, saves_inside=True),
    "gpt-oss": Shape(windows=1, window=128),
    "gemma-3": Shape(windows=5, window=1024),
    "llama": Shape(),
}


class Setting(NamedTuple):
    """What an engine is told about its prefix cache."""

    unit: int | None = None
    retention: int | None = 0


class Engine:
    """One engine core's scheduler, and a worker that says what was recorded.

    Args:
        shape: the KV cache groups.
        num_blocks: in the pool.
        setting: of vLLM's prefix cache.
        is_stateful: with the plugin.
        is_async: whether a step is scheduled while one is computed.
        tokenizer: of the engine core; None without.
    """

    def __init__(
        self,
        shape: Shape,
        num_blocks: int,
        setting: Setting,
        *,
        is_stateful: bool,
        is_async: bool = True,
        tokenizer: Any = None,
        max_num_seqs: int = 8,
        max_batched: int = 8192,
    ) -> None:
        config = _config(max_num_seqs, max_batched)
        config.cache_config.block_size = shape.block
        config.cache_config.prefix_match_unit = setting.unit
        config.cache_config.prefix_cache_retention_interval = setting.retention
        config.cache_config.num_gpu_blocks = num_blocks
        config.cache_config.mamba_cache_mode = "align" if shape.states else "none"
        config.scheduler_config.async_scheduling = is_async
        kv_config = KVCacheConfig(
            num_blocks, [], shape.groups(), prefix_cache_retention_interval=setting.retention
        )
        size, unit = resolve_kv_cache_block_sizes(kv_config, config)
        structured = StructuredOutputManager(config)
        structured.tokenizer = tokenizer
        self.scheduler: Any = _scheduler(is_stateful=is_stateful, is_async=is_async)(
            vllm_config=config,
            kv_cache_config=kv_config,
            structured_output_manager=structured,
            block_size=size,
            hash_block_size=unit,
            log_stats=True,
        )
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(unit, hash_function)
        self._depth = 2 if is_async else 1
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._answers: dict[str, Sequence[int]] = {}
        self._computed: dict[str, int] = {}
        self._prompt: dict[str, int] = {}
        self.cached: dict[str, int] = {}
        """Tokens of a request that were there when it was first scheduled."""

    @property
    def was_full(self) -> bool:
        """Whether a block was taken twice: the last ones of the pool stand as at the start."""
        blocks = self.scheduler.kv_cache_manager.block_pool.blocks
        return blocks[-1].prev_free_block is not blocks[-2]

    def add(
        self,
        name: str,
        prompt: Sequence[int],
        answer: Sequence[int],
        ends: Sequence[int],
        session: str | None = None,
    ) -> Request:
        """A request whose answer is known, its last token one that ends answers."""
        params = SamplingParams(
            temperature=0, max_tokens=len(answer) + 8, stop_token_ids=list(ends)
        )
        request = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=params,
            pooling_params=None,
            session_id=session,
            block_hasher=self._hasher,
        )
        self._answers[name] = answer
        self._prompt[name] = len(prompt)
        self.scheduler.add_request(request)
        return request

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """What a model runner returns."""
        for new in step.scheduled_new_reqs:
            self._computed[new.req_id] = self.cached[new.req_id] = new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        self._computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        names = list(step.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[
                self._sampled(name, step.num_scheduled_tokens[name]) for name in names
            ],
        )

    def _sampled(self, name: str, num_tokens: int) -> list[int]:
        place = self._computed[name] + num_tokens - self._prompt[name]
        if place < 0:
            return []
        answer = self._answers[name]
        return [answer[min(place, len(answer) - 1)]]

    def step(self) -> None:
        """One round of vLLM's ``step_with_batch_queue``, or of ``step``."""
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self._in_flight.append((output, self.execute(output)))
            if len(self._in_flight) < self._depth and output.total_num_scheduled_tokens:
                return
        if self._in_flight:
            self.scheduler.update_from_output(*self._in_flight.popleft())

    def run(self) -> None:
        """Until all requests have ended."""
        while self.scheduler.has_requests() or self._in_flight:
            self.step()


def _scheduler(*, is_stateful: bool, is_async: bool) -> Any:
    if not is_stateful:
        return AsyncScheduler if is_async else Scheduler
    from vllm_stateful.adapters.engine.scheduler import StatefulAsyncScheduler, StatefulScheduler

    return StatefulAsyncScheduler if is_async else StatefulScheduler


def _config(max_num_seqs: int, max_batched: int) -> VllmConfig:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_MODEL))
        return EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_batched,
            enable_prefix_caching=True,
        ).create_engine_config()
