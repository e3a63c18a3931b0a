# SPDX-License-Identifier: Apache-2.0
"""What vLLM's ``LMCacheConnectorV1`` asks of the package ``lmcache``, over simulated slots.

The scheduler's side does what ``lmcache.integration.vllm.vllm_v1_adapter`` (0.5.6) does: lookups by
chunks of tokens, loads inside the step that reads them, from the begin of a chunk on, nothing kept
back when a request ends. Releases differ in whether the part of a chunk that vLLM has is written
again; ``overwrites`` says which one this is. A load must never write a block that others hold.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput

CHUNK = 12
"""Three blocks of the simulated engine."""


def lmcache(num_chunks: int, policy: Any = "recompute", **extra: Any) -> KVTransferConfig:
    """vLLM's configuration of an LMCache of so many chunks."""
    return KVTransferConfig(
        kv_connector="LMCacheConnectorV1",
        kv_role="kv_both",
        kv_load_failure_policy=policy,
        kv_connector_extra_config={"num_chunks": num_chunks, **extra},
    )


class _Load(NamedTuple):
    request_id: str
    tokens: tuple[int, ...]
    blocks: list[int]
    num_here: int
    """What vLLM has of them."""


class _Save(NamedTuple):
    tokens: tuple[int, ...]
    blocks: list[int]


class Metadata(KVConnectorMetadata):
    """Of one step."""

    def __init__(self) -> None:
        self.loads: list[_Load] = []
        self.saves: list[_Save] = []
        self.admitted: set[str] = set()


@dataclass
class _Tracker:
    tokens: list[int]
    blocks: list[int]
    num_saved: int = 0


@dataclass
class _Spec:
    num_here: int
    num_there: int
    can_load: bool = False


class LMCacheConnectorV1Impl:
    """The scheduler's side, and the chunks of both."""

    def __init__(self, config: Any, role: Any, parent: Any) -> None:
        extra = config.kv_transfer_config.kv_connector_extra_config
        self._lmcache_chunk_size = CHUNK
        self._num_chunks = extra["num_chunks"]
        self._is_slow = extra.get("is_slow", False)
        self.overwrites = extra.get("overwrites", True)
        self.failing = random.Random(0) if extra.get("fails") else None
        self.chunks: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()
        self._specs: dict[str, _Spec] = {}
        self._asked: set[str] = set()
        self._trackers: dict[str, _Tracker] = {}
        self._requests: dict[str, Any] = {}
        self._admitted: set[str] = set()

    def get_num_new_matched_tokens(self, request: Any, num_here: int) -> int | None:
        if self._is_slow and request.request_id not in self._asked:
            self._asked.add(request.request_id)
            return None
        tokens = tuple(request.all_token_ids)
        num_there = 0
        while num_there + CHUNK <= len(tokens) and tokens[: num_there + CHUNK] in self.chunks:
            num_there += CHUNK
        self._specs[request.request_id] = _Spec(num_here, num_there)
        return max(0, num_there - num_here - (num_there == request.num_tokens))

    def update_state_after_alloc(self, request: Any, num_loaded: int) -> None:
        self._asked.discard(request.request_id)
        self._admitted.add(request.request_id)
        self._requests[request.request_id] = request
        spec = self._specs.get(request.request_id)
        if spec is not None:
            spec.can_load = num_loaded > 0
            whole = spec.num_there == request.num_tokens
            assert num_loaded in (0, spec.num_there - spec.num_here - whole)

    def build_connector_meta(self, output: SchedulerOutput) -> Metadata:
        made = Metadata()
        made.admitted, self._admitted = self._admitted, set()
        for request_id in output.finished_req_ids:
            self._trackers.pop(request_id, None)
            self._requests.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            self._begins(made, output, new.req_id, new.num_computed_tokens, new.block_ids[0])
        cached = output.scheduled_cached_reqs
        for place, request_id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[place]
            if request_id in cached.resumed_req_ids:
                assert blocks is not None
                start = cached.num_computed_tokens[place]
                self._begins(made, output, request_id, start, blocks[0])
                continue
            tracker = self._trackers[request_id]
            tracker.blocks += () if blocks is None else blocks[0]
            first = len(tracker.tokens)
            last = first + output.num_scheduled_tokens[request_id]
            tracker.tokens += self._requests[request_id].all_token_ids[first:last]
            self._save(made, tracker, cached.num_computed_tokens[place], output, request_id)
        return made

    def _begins(
        self, made: Metadata, output: SchedulerOutput, request_id: str, start: int, blocks: Any
    ) -> None:
        last = start + output.num_scheduled_tokens[request_id]
        tokens = list(self._requests[request_id].all_token_ids[:last])
        tracker = self._trackers[request_id] = _Tracker(tokens, list(blocks))
        spec = self._specs.pop(request_id, None)
        if spec is not None:
            tracker.num_saved = spec.num_there
            if spec.can_load:
                there = tuple(tokens[: spec.num_there])
                made.loads.append(_Load(request_id, there, list(blocks), spec.num_here))
        self._save(made, tracker, start, output, request_id)

    def _save(
        self,
        made: Metadata,
        tracker: _Tracker,
        start: int,
        output: SchedulerOutput,
        request_id: str,
    ) -> None:
        """Whole chunks only, and no drafts."""
        drafted = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
        last = start + output.num_scheduled_tokens[request_id] - drafted
        last = min(last, len(tracker.tokens)) // CHUNK * CHUNK
        del tracker.tokens[start + output.num_scheduled_tokens[request_id] - drafted :]
        if last > tracker.num_saved:
            made.saves.append(_Save(tuple(tracker.tokens[:last]), list(tracker.blocks)))
            tracker.num_saved = last

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        return False, None

    def keep(self, tokens: tuple[int, ...], slots: list[int]) -> None:
        """A chunk, in the place of the one that was not used for longest."""
        self.chunks[tokens] = slots
        self.chunks.move_to_end(tokens)
        while len(self.chunks) > self._num_chunks:
            self.chunks.popitem(last=False)


@dataclass
class SimulatedLMCache:
    """The worker's side.

    Args:
        slots: of the worker, by block.
        engine: the scheduler's side.
        manager: the KV cache manager, which is asked who holds a block.
    """

    slots: list[list[int]]
    engine: LMCacheConnectorV1Impl
    manager: Any
    num_loaded: int = 0
    num_failed: int = 0
    lost: set[int] = field(default_factory=set)
    """Blocks that this step could not load."""

    def begin(self, meta: Any) -> None:
        """Before the step computes: what it loads."""
        size = self.manager.block_pool.hash_block_size
        self.lost = set()
        for load in meta.loads:
            end, first = len(load.tokens), load.num_here // CHUNK * CHUNK
            chunks = [load.tokens[:n] for n in range(CHUNK, end + 1, CHUNK)]
            slots = [slot for chunk in chunks for slot in self.engine.chunks[chunk]]
            failed = end
            if self.engine.failing is not None and self.engine.failing.random() < 0.3:
                failed = self.engine.failing.randrange(first, end)
                self.num_failed += 1
            for place in range(first if self.engine.overwrites else load.num_here, end):
                block = load.blocks[place // size]
                self._check_is_its_own(block, load.request_id, meta.admitted)
                self.slots[block][place % size] = -1 if place >= failed else slots[place]
                self.num_loaded += 1
            self.lost |= {load.blocks[place // size] for place in range(failed, end)}

    def _check_is_its_own(self, block_id: int, request_id: str, admitted: set[str]) -> None:
        kept = {b.block_id for r in self.manager.store.residencies() for b in r.blocks}
        assert block_id not in kept, f"{request_id}: a load writes block {block_id}, which is kept"
        (manager,) = self.manager.coordinator.single_type_managers
        for name in manager.req_to_blocks.keys() - admitted:  # the others may share what is loaded
            held = {block.block_id for block in manager.req_to_blocks[name]}
            assert block_id not in held, f"{request_id}: a load writes block {block_id} of {name}"

    def end(self, meta: Any) -> KVConnectorOutput | None:
        """After the step has computed: what it saves, and what it could not load."""
        size = self.manager.block_pool.hash_block_size
        for save in meta.saves:
            for end in range(CHUNK, len(save.tokens) + 1, CHUNK):
                places = range(end - CHUNK, end)
                slots = [self.slots[save.blocks[p // size]][p % size] for p in places]
                if -1 not in slots:
                    self.engine.keep(save.tokens[:end], slots)
        return KVConnectorOutput(invalid_block_ids=set(self.lost)) if self.lost else None


def _module(name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


def stand_in() -> None:
    """Put this in the place of the package, which has no build for machines without CUDA."""
    for name in ("lmcache", "lmcache.integration", "lmcache.integration.vllm"):
        if name not in sys.modules:
            _module(name)
    _module(
        "lmcache.integration.vllm.vllm_v1_adapter", LMCacheConnectorV1Impl=LMCacheConnectorV1Impl
    )
