# SPDX-License-Identifier: Apache-2.0
"""vLLM's real scheduler and KV cache manager, driven over a worker that remembers every KV slot.

The worker keeps, for each slot of each block, a digest of the token prefix that was written
there. Whenever a request is scheduled, every slot that its attention would read is compared with
the digest of the request's own prefix: reading one wrong, stale or foreign slot fails at once.
The "model" samples a function of the whole prefix, so answers can be compared with the truth.
With ``async_scheduling`` two steps are in flight, as with vLLM's batch queue on CUDA. Drafts are
then the worker's own, as model runner V2's: only it knows how many of a step in flight are right.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import lcm
from pathlib import Path
from typing import Any

from simulated_connectors import worker_of
from simulated_groups import Vocabulary, cache_config, first_read, head_config, parted
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_stateful.adapters.engine.answer_ends import AnswerEnds
from vllm_stateful.adapters.engine.engine_drafts import EngineDrafts
from vllm_stateful.adapters.engine.scheduler import StatefulAsyncScheduler, StatefulScheduler
from vllm_stateful.adapters.slots import of_step

VOCAB = 100
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}


def next_prefix(prefix: int, token: int) -> int:
    """The digest of a prefix after one more token."""
    return int.from_bytes(
        hashlib.blake2b(
            prefix.to_bytes(8, "big") + (token & 0xFFFFFFFF).to_bytes(4, "big"), digest_size=8
        ).digest(),
        "big",
    )


def sample(prefix: int) -> int:
    """The "model": a token that depends on every token before it."""
    return prefix % VOCAB


def expected_answer(prompt: list[int], max_tokens: int) -> list[int]:
    """What a stock, stateless engine answers."""
    prefix = 0
    for token in prompt:
        prefix = next_prefix(prefix, token)
    answer = []
    for _ in range(max_tokens):
        answer.append(sample(prefix))
        prefix = next_prefix(prefix, answer[-1])
    return answer


def half_right(tokens: Sequence[int], num: int) -> list[int]:
    """Drafts of what follows, of which about half are right."""
    drafts = expected_answer(list(tokens), num)
    num_right = len(tokens) % (num + 1)
    return drafts[:num_right] + [(token + 1) % VOCAB for token in drafts[num_right:]]


@dataclass
class WorkerRequest:
    """What a model runner keeps of a request."""

    tokens: list[int]
    tables: list[list[int]]
    """Block ids of each group."""
    num_computed: int
    num_prompt: int
    state_block: int | None = None
    """Where in its block tables the running state is; None before the first step."""
    num_accepted: int = 1
    """The state that counts is so many blocks further, less one."""
    drafts: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=lambda: [0])

    def prefix_after(self, num_tokens: int) -> int:
        while len(self.prefixes) <= num_tokens:
            token = self.tokens[len(self.prefixes) - 1]
            self.prefixes.append(next_prefix(self.prefixes[-1], token))
        return self.prefixes[num_tokens]


class SimulatedWorker:
    """Executes scheduler outputs over slots of digests."""

    def __init__(
        self, num_blocks: int, block_size: int, kinds: tuple[str, ...] = ("full",)
    ) -> None:
        self.block_size = block_size
        self.kinds = [parted(kind)[0] for kind in kinds]
        self.sizes = [block_size * parted(kind)[1] for kind in kinds]
        self.slots = [[0] * max(self.sizes) for _ in range(num_blocks)]
        self.requests: dict[str, WorkerRequest] = {}
        self.num_tokens_computed = 0
        self.are_heads_read = True
        """Whether the KV of draft heads must be right, too; it decides what is drafted only."""
        self.tier: Any = None
        """The worker's side of a KV connector."""
        self.num_own_drafts = 0
        """Those that it makes of each request itself."""
        self.are_states_spread = False
        """Whether each token of a step that may verify drafts leaves a state of its own."""
        self.ends: tuple[int, ...] = ()
        """Tokens of which no draft is accepted."""
        self.num_ended_early = 0

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        if self.tier is None:
            return self._compute(step)
        self.tier.begin(step.kv_connector_metadata)
        output = self._compute(step)
        output.kv_connector_output = self.tier.end(step.kv_connector_metadata)
        return output

    def _compute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        for request_id in step.finished_req_ids:
            self.requests.pop(request_id, None)
        for copy in step.kv_cache_block_copies or ():
            self.slots[copy.dst_block_id] = list(self.slots[copy.src_block_id])
        self.ends = of_step(step).ends or self.ends
        self._update(step)
        sampled = {
            request_id: self._run(
                request_id, num_tokens, step.scheduled_spec_decode_tokens.get(request_id, [])
            )
            for request_id, num_tokens in step.num_scheduled_tokens.items()
        }
        ids = list(sampled)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=list(sampled.values()),
        )

    def _update(self, step: SchedulerOutput) -> None:
        for new in step.scheduled_new_reqs:
            tokens = list(new.prefill_token_ids or new.prompt_token_ids or ())
            tables = [list(blocks) for blocks in new.block_ids]
            self.requests[new.req_id] = WorkerRequest(
                tokens, tables, new.num_computed_tokens, len(tokens)
            )
        cached = step.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            request = self.requests[request_id]
            is_resumed = request_id in cached.resumed_req_ids
            if is_resumed or not self.num_own_drafts:  # else what the scheduler knows is behind
                request.num_computed = cached.num_computed_tokens[index]
            new_blocks = cached.new_block_ids[index]
            if is_resumed:
                assert new_blocks is not None
                request.tables = [list(blocks) for blocks in new_blocks]
                request.state_block, request.num_accepted = None, 1
                request.num_prompt = len(request.tokens)
            elif new_blocks is not None:
                for table, blocks in zip(request.tables, new_blocks, strict=True):
                    table.extend(blocks)

    def _run(self, request_id: str, num_tokens: int, drafts: list[int]) -> list[int]:
        """Compute ``num_tokens``; returns the sampled token, after the drafts it accepts."""
        request = self.requests[request_id]
        if drafts and self.num_own_drafts:
            drafts = request.drafts[: len(drafts)]
        start, end = request.num_computed, request.num_computed + num_tokens
        known = len(request.tokens)
        assert end <= known + len(drafts), f"{request_id}: scheduled beyond its tokens"
        is_lost = self.tier is not None and any(
            block in self.tier.lost for table in request.tables for block in table
        )
        if not is_lost:
            self._read(request_id, request, start, end)
        prefix = request.prefix_after(min(start, known))
        first_prefix = prefix
        computed = [*request.tokens, *drafts][start:end]
        sampled: list[int] = []
        accepting = True
        is_decode = bool(drafts) or start >= request.num_prompt
        for position, token in enumerate(computed, start):
            is_right = position < known or (sampled and token == sampled[-1])
            if accepting and is_right and position >= known and token in self.ends:
                is_right, self.num_ended_early = False, self.num_ended_early + 1
            accepting = bool(accepting and is_right)
            prefix = next_prefix(prefix, token)
            self._write(request, position, prefix, position - start if is_decode else 0)
            if position >= known - 1 and accepting:
                sampled.append(sample(prefix))
        self.num_tokens_computed += num_tokens
        request.num_computed = end
        if is_lost:  # the scheduler drops what comes of it
            return sampled
        request.tokens.extend(sampled)
        request.num_computed -= len(drafts) + 1 - len(sampled) if sampled else 0
        if self.num_own_drafts and request.num_computed == len(request.tokens) - 1:
            request.drafts = half_right(request.tokens, self.num_own_drafts)
        if self.are_states_spread:
            self._settle_states(request, max(1, len(sampled)))
        if "head" in self.kinds:
            self._run_head(request, start, end, first_prefix, computed)
        return sampled

    def _settle_states(self, request: WorkerRequest, num_accepted: int) -> None:
        """Which state counts, and whether one is at the end of a block (``postprocess_mamba``)."""
        assert request.state_block is not None
        num_computed, request.num_accepted = request.num_computed, num_accepted
        size = self.sizes[self.kinds.index("state")]
        aligned = num_computed // size * size
        bias = aligned - (num_computed - request.num_accepted + 1)
        if bias < 0:
            return
        source, target = request.state_block + bias, aligned // size - 1
        self._copy_states(request, source, target)
        if request.state_block == target:
            request.num_accepted = 1

    def _copy_states(self, request: WorkerRequest, source: int, target: int) -> None:
        for group, kind in enumerate(self.kinds):
            if kind == "state":
                table = request.tables[group]
                self.slots[table[target]] = list(self.slots[table[source]])

    def _run_head(
        self, request: WorkerRequest, start: int, end: int, prefix: int, computed: list[int]
    ) -> None:
        """The draft head reads what the step has computed, each with the token behind it."""
        for position, token in zip(range(start, end), computed, strict=True):
            prefix = next_prefix(prefix, token)
            behind = request.tokens[position + 1] if position + 1 < len(request.tokens) else 0
            for group, kind in enumerate(self.kinds):
                if kind == "head":
                    block = request.tables[group][position // self.sizes[group]]
                    self.slots[block][position % self.sizes[group]] = next_prefix(prefix, behind)

    def _read(self, request_id: str, request: WorkerRequest, start: int, end: int) -> None:
        """What the first token of the step reads must be the request's own prefix."""
        if "state" in self.kinds:
            self._move_states(request, start, end)
        for group, kind in enumerate(self.kinds):
            if kind == "state":
                if start and self._state(request, group) != request.prefix_after(start):
                    raise AssertionError(f"{request_id}: wrong state of group {group} at {start}")
                continue
            if kind == "head" and not self.are_heads_read:
                continue
            for position in range(first_read(kind, start), start):
                made_of = position + (2 if kind == "head" else 1)
                if self._slot(request, group, position) != request.prefix_after(made_of):
                    raise AssertionError(
                        f"{request_id}: wrong KV of group {group} at {position} of {start}"
                    )

    def _move_states(self, request: WorkerRequest, start: int, end: int) -> None:
        size = self.sizes[self.kinds.index("state")]
        before = request.state_block
        if before is None:
            before = (start - 1) // size
        now = request.state_block = -(-end // size) - 1
        if before in (-1, now):
            return
        self._copy_states(request, before + request.num_accepted - 1, now)
        request.num_accepted = 1

    def _write(self, request: WorkerRequest, position: int, prefix: int, place: int) -> None:
        for group, kind in enumerate(self.kinds):
            table, size = request.tables[group], self.sizes[group]
            if kind == "head":
                continue
            if kind == "state":
                assert request.state_block is not None
                block, slot = table[request.state_block + place * self.are_states_spread], 0
            else:
                block, slot = table[position // size], position % size
            assert block, "a write to the null block"
            self.slots[block][slot] = prefix

    def _slot(self, request: WorkerRequest, group: int, position: int) -> int:
        size = self.sizes[group]
        return self.slots[request.tables[group][position // size]][position % size]

    def _state(self, request: WorkerRequest, group: int) -> int:
        assert request.state_block is not None
        place = request.state_block + request.num_accepted - 1
        return self.slots[request.tables[group][place]][0]


@lru_cache(maxsize=1)
def model_folder() -> str:
    """A folder with a config only; no weights are ever loaded."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="simulated-model-"))
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG))
    return str(folder)


@lru_cache(maxsize=4)
def vllm_config(block_size: int, max_num_seqs: int, max_batched: int) -> VllmConfig:
    args = EngineArgs(
        model=model_folder(),
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_batched,
        enable_prefix_caching=True,
    )
    config = args.create_engine_config()
    config.cache_config.block_size = block_size
    init_none_hash(get_hash_fn_by_name("sha256"))
    return config


class SimulatedEngine:
    """The scheduler of one engine core, its worker, and a queue of steps in flight."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_batched: int = 64,
        async_scheduling: bool = False,
        scheduler_cls: type | None = None,
        num_drafts: int = 0,
        kv_transfer: KVTransferConfig | None = None,
        session_drafts: bool = False,
        beside_head: bool = False,
        kinds: tuple[str, ...] = ("full",),
        retention: int | None = 0,
        has_markers: bool = False,
        has_roles: bool = False,
        ends: tuple[int, ...] = (),
    ) -> None:
        config = vllm_config(block_size, max_num_seqs, max_batched)
        names, times = zip(*map(parted, kinds), strict=True)
        scheduled = block_size * lcm(*times)
        config.cache_config.mamba_cache_mode = "align" if "state" in names else "none"
        config.cache_config.block_size = scheduled
        config.cache_config.prefix_match_unit = block_size if len(kinds) > 1 else None
        config.speculative_config = head_config() if "head" in names else None
        config.kv_transfer_config = kv_transfer
        config.scheduler_config.disable_hybrid_kv_cache_manager = (
            kv_transfer is not None and not KVConnectorFactory.supports_hma_config(kv_transfer)
        )
        config.cache_config.num_gpu_blocks = num_blocks
        config.scheduler_config.async_scheduling = async_scheduling
        default = StatefulAsyncScheduler if async_scheduling else StatefulScheduler
        on_device = num_drafts if async_scheduling and not session_drafts else 0
        kv_config = cache_config(kinds, num_blocks, block_size, retention, num_drafts)
        structured = StructuredOutputManager(config)
        structured.tokenizer = Vocabulary(VOCAB, has_roles=has_roles) if has_markers else None
        self.scheduler: Any = (scheduler_cls or default)(
            vllm_config=config,
            kv_cache_config=kv_config,
            structured_output_manager=structured,
            block_size=scheduled,
            hash_block_size=block_size,
            log_stats=not num_drafts,
        )
        self.num_drafts = self.scheduler.num_spec_tokens = num_drafts
        self.manager = self.scheduler.kv_cache_manager
        if num_drafts and hasattr(self.manager, "expect_drafts"):
            self.manager.expect_drafts(num_drafts, is_step_known=on_device > 0)
        if on_device:
            self.scheduler._spec_token_placeholders = [-1] * num_drafts
            self.scheduler.use_v2_model_runner = True
            if "state" in names:
                self.scheduler.ends = AnswerEnds(ends)
        if session_drafts:
            self.scheduler.engine_drafts = EngineDrafts(
                self.manager, None, num_drafts, is_beside_head=beside_head
            )
        self.worker = SimulatedWorker(num_blocks, block_size, kinds)
        self.worker.num_own_drafts = on_device
        self.worker.are_states_spread = num_drafts > 0 and "state" in names
        if kv_transfer is not None:
            self.worker.tier = worker_of(self.scheduler.connector, self.worker.slots, self.manager)
        self.block_size = block_size
        self.depth = 2 if async_scheduling else 1
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.finished: dict[str, Request] = {}
        # With a draft head vLLM hashes the token behind a block as well, from 0.33 on.
        num_ahead = getattr(config, "num_hash_lookahead_tokens", 0)
        self.hasher = get_request_block_hasher(
            block_size, get_hash_fn_by_name("sha256"), *([num_ahead] if num_ahead else [])
        )

    def add(
        self,
        request_id: str,
        prompt: list[int],
        *,
        session_id: str | None = None,
        max_tokens: int = 4,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_time: float = 0.0,
        lora_request: Any = None,
        **options: Any,
    ) -> Request:
        options.setdefault("temperature", 0)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options)
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=params,
            pooling_params=None,
            arrival_time=arrival_time,
            cache_salt=cache_salt,
            lora_request=lora_request,
            priority=priority,
            session_id=session_id,
            block_hasher=self.hasher,
        )
        self.scheduler.add_request(request)
        self.finished[request_id] = request
        return request

    def step(self) -> None:
        """One round of vLLM's ``step_with_batch_queue`` (or ``step``, with depth 1)."""
        if self.scheduler.has_requests():
            num_tokens = self.schedule()
            if len(self.in_flight) < self.depth and num_tokens:
                return
        if self.in_flight:
            self.update()

    def schedule(self) -> int:
        """Schedule a step and start it. Returns its number of tokens."""
        output = self.scheduler.schedule()
        self.in_flight.append((output, self.worker.execute(output)))
        return int(output.total_num_scheduled_tokens)

    def update(self) -> None:
        """Process the oldest step in flight."""
        self.scheduler.update_from_output(*self.in_flight.popleft())
        self._propose()

    def _propose(self) -> None:
        """Drafts as `ngram` makes them (synchronous scheduling): some right, some wrong."""
        speculation = self.scheduler.engine_drafts
        running = self.scheduler.running if self.num_drafts else ()
        if self.worker.num_own_drafts:
            return
        if speculation is None:
            for request in running:
                if request.num_computed_tokens >= request.num_tokens - 1:
                    request.spec_token_ids = half_right(request.all_token_ids, self.num_drafts)
            return
        is_head = speculation.is_beside_head
        made = {
            each.request_id: half_right(each.all_token_ids, self.num_drafts) if is_head else []
            for each in running
        }
        self.scheduler.update_draft_token_ids(DraftTokenIds(list(made), list(made.values())))

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left to do. Fails when requests wait for ever."""
        for _ in range(max_steps):
            if not self.scheduler.has_requests() and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"still unfinished: {list(self.scheduler.requests)}")

    def abort(self, request_id: str) -> None:
        """What happens when a client disconnects."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def answer(self, request_id: str) -> list[int]:
        return list(self.finished[request_id].output_token_ids)
