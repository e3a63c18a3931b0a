# SPDX-License-Identifier: Apache-2.0
"""One client and one engine core without a model: vLLM's messages, requests and block hasher."""

import asyncio
import queue
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_stateful.adapters.engine.prompt_receiver import receive
from vllm_stateful.adapters.frontend.prompt_sender import sender_of
from vllm_stateful.transport.prompt_ids import PromptTokenIds

BLOCK = 16
VOCAB = 1000
LONG = 20 * BLOCK


def prompt(
    length: int, version: int = 0, *, parent: int = 0, shared: int = 0, first: int = 0
) -> PromptTokenIds:
    """Ids that count up from zero, or from ``first`` behind what is shared."""
    ids = [*range(shared), *range(first + shared, first + length)]
    return PromptTokenIds(
        [i % VOCAB for i in ids], version=version, parent=parent, num_parent_tokens=shared
    )


def request_of(ids: list[int], **fields: Any) -> EngineCoreRequest:
    defaults: dict[str, Any] = {
        "request_id": "r",
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=4),
        "pooling_params": None,
        "arrival_time": 1.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(prompt_token_ids=ids, **(defaults | fields))


def over_the_wire(message: Any, kind: Any = EngineCoreRequest) -> Any:
    """As the engine decodes what the client encodes."""
    return MsgpackDecoder(kind).decode(MsgpackEncoder().encode(message))


class Core(EngineCoreProc):  # type: ignore[misc]
    """The parts of an engine core that a new request passes, without a model."""

    def __init__(self, caching: bool = True) -> None:
        self.mm_receiver_cache = None
        self.engine_index = 0
        self.output_queue: Any = queue.Queue()
        self.scheduler: Any = SimpleNamespace(hash_block_size=BLOCK)
        model = SimpleNamespace(
            get_vocab_size=lambda: VOCAB,
            max_model_len=1 << 20,
            logits_processors=None,
            architectures=["LlamaForCausalLM"],
        )
        self.vllm_config: Any = SimpleNamespace(
            model_config=model,
            parallel_config=SimpleNamespace(distributed_executor_backend="mp", nnodes=1),
            use_v2_model_runner=False,
        )
        self.num_hashed = 0
        init_none_hash(sha256)
        hasher = get_request_block_hasher(BLOCK, self._hash)
        self.request_block_hasher: Any = hasher if caching else None

    def _hash(self, value: Any) -> bytes:
        self.num_hashed += 1
        return bytes(sha256(value))

    def take(self, message: EngineCoreRequest) -> Request:
        made, wave = receive(self, message, EngineCore.preprocess_add_request)
        assert wave == message.current_wave
        return made


class Client:
    """What the sender uses of an ``AsyncMPClient``."""

    core_engine = b"engine-0"
    core_engines = (b"engine-0", b"engine-1")

    def __init__(self, answer: Any = None) -> None:
        self.answer = {"ready": True} if answer is None else answer
        self.asked: list[tuple[Any, ...]] = []

    async def _call_utility_async(self, *arguments: Any, engine: bytes) -> Any:
        self.asked.append((*arguments, engine))
        await asyncio.sleep(0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Link:
    """One client and one engine core that takes deltas."""

    def __init__(self) -> None:
        self.client, self.core = Client(), Core()
        self.sender = sender_of(self.client)

    def send(self, request: EngineCoreRequest) -> Request:
        return self.core.take(over_the_wire(self.sender.pack(request, b"engine-0")))


def stock_request(request: EngineCoreRequest) -> Request:
    """What vLLM makes of the same request without us."""
    made, _ = EngineCore.preprocess_add_request(Core(), over_the_wire(request))
    return made
