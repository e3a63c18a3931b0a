# SPDX-License-Identifier: Apache-2.0
"""The patches along the way of a prompt, against the installed vLLM; see ``test_patched``.

Its clients and engine cores are vLLM's own classes, made without their constructors.
"""

import asyncio
import importlib.util
import queue
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

import tokenizers.decoders
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_stateful.compat.ledger import patch_of

pytestmark = pytest.mark.usefixtures("stock_vllm")

PROMPT = list(range(40))


def core_request(request_id: str = "r", prompt: list[int] | None = None) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(PROMPT) if prompt is None else prompt,
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None,
        arrival_time=1.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


# --- detokenizer-prompt


@pytest.fixture
def primed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What vLLM primes its decode streams with."""
    seen = []
    stock = tokenizers.decoders.DecodeStream

    def record(ids: Any = None, skip_special_tokens: bool = False) -> Any:
        seen.append(ids)
        return stock(ids=ids, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(tokenizers.decoders, "DecodeStream", record)
    return seen


def fast_tokenizer() -> Any:
    """A tokenizer of bytes, as much of it as the detokenizer looks at."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.decoder = decoders.ByteLevel()
    return SimpleNamespace(_tokenizer=backend)


def test_detokenizer_prompt_hook_says_what_the_stream_is_primed_with(
    primed: list[list[int]],
) -> None:
    tokenizer, request = fast_tokenizer(), core_request()
    stock = FastIncrementalDetokenizer(tokenizer, request).decode_next(66)
    patch_of("detokenizer-prompt").apply()
    assert FastIncrementalDetokenizer(tokenizer, request).decode_next(66) == stock
    seen = []

    def shorten(tokenizer: Any, request: Any) -> Any:
        seen.append((tokenizer, request))
        return core_request(prompt=PROMPT[-5:])

    patch_of("detokenizer-prompt").calls[0].set(shorten)
    assert FastIncrementalDetokenizer(tokenizer, request).decode_next(66) == stock
    assert seen == [(tokenizer, request)]
    assert primed == [PROMPT, PROMPT, PROMPT[-5:]]


def test_stock_decodes_the_whole_prompt_when_the_first_token_arrives(
    primed: list[list[int]],
) -> None:
    prompt = PROMPT * 100
    FastIncrementalDetokenizer(fast_tokenizer(), core_request(prompt=prompt))
    assert primed == [prompt]


# --- prompt-send


class BareClient(AsyncMPClient):
    """The real sending and receiving, between an encoder and lists instead of sockets."""

    def __init__(self) -> None:
        self.core_engine, self.client_index = b"engine-0", 3
        self.encoder = MsgpackEncoder()
        self.outputs_queue: Any = asyncio.Queue()
        self.resources: Any = SimpleNamespace(engine_dead=False)
        self.sent: list[tuple[Any, bytes]] = []

    def __del__(self) -> None:
        """There is nothing to shut down."""

    def _ensure_output_queue_task(self) -> None:
        """No socket is read."""

    async def _send_input_message(self, message: Any, engine: Any) -> None:
        request_type, *frames = message
        kind: Any = EngineCoreRequest if request_type == b"\x00" else None
        self.sent.append((engine, MsgpackDecoder(kind).decode(frames)))


def sent(client: BareClient) -> list[Any]:
    """Add and abort a request; returns what was sent."""

    async def send() -> None:
        await client.add_request_async(core_request())
        await client._send_input(EngineCoreRequestType.ADD, core_request("other"), b"engine-1")
        await client.abort_requests_async(["r"])

    asyncio.run(send())
    return [(engine, repr(message)) for engine, message in client.sent]


def test_prompt_send_hook_gets_every_message_and_its_engine() -> None:
    stock = sent(BareClient())
    patch_of("prompt-send").apply()
    assert sent(BareClient()) == stock
    seen = []

    def shorten(client: Any, request_type: Any, message: Any, engine: Any) -> Any:
        seen.append((client, request_type, message, engine))
        if request_type == EngineCoreRequestType.ADD:
            return core_request(message.request_id, [1])
        return message

    patch_of("prompt-send").calls[0].set(shorten)
    client = BareClient()
    sent(client)
    assert [message.prompt_token_ids for _, message in client.sent[:2]] == [[1], [1]]
    assert client.sent[2] == (b"engine-0", ["r"])
    assert [(who, kind.name, engine) for who, kind, _, engine in seen] == [
        (client, "ADD", None),
        (client, "ADD", b"engine-1"),
        (client, "ABORT", None),
    ]
    assert [seen[0][2].request_id, seen[1][2].request_id, seen[2][2]] == ["r", "other", ["r"]]


def test_stock_sends_every_id_of_a_prompt_again() -> None:
    client = BareClient()
    for _ in range(2):
        asyncio.run(client.add_request_async(core_request()))
    assert [message.prompt_token_ids for _, message in client.sent] == [PROMPT, PROMPT]
    assert not [name for name in dir(AsyncMPClient) if "codec" in name or "delta" in name]


# --- prompt-answers


def outputs_of(*request_ids: str) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=[EngineCoreOutput(name, [1]) for name in request_ids])


def received(client: BareClient, outputs: Any) -> Any:
    async def get() -> Any:
        client.outputs_queue.put_nowait(outputs)
        return await client.get_output_async()

    return asyncio.run(get())


def test_prompt_answers_hook_sees_the_outputs_and_its_requests_are_sent() -> None:
    outputs = outputs_of("a", "b")
    assert received(BareClient(), outputs) is outputs
    patch_of("prompt-answers").apply()
    assert received(BareClient(), outputs) is outputs
    seen = []

    def take(client: Any, outputs: Any) -> list[Any]:
        seen.append((client, outputs))
        del outputs.outputs[0]
        return [core_request("again")]

    patch_of("prompt-answers").calls[0].set(take)
    client = BareClient()
    assert [output.request_id for output in received(client, outputs).outputs] == ["b"]
    assert seen == [(client, outputs)]
    ((engine, message),) = client.sent
    assert (engine, message.request_id, message.client_index) == (b"engine-0", "again", 3)


def test_stock_hands_a_failed_request_to_its_caller() -> None:
    client, failed = BareClient(), EngineCoreOutput("a", [], finish_reason=FinishReason.ERROR)
    outputs = received(client, EngineCoreOutputs(outputs=[failed]))
    assert outputs.outputs == [failed]
    assert client.sent == []


# --- prompt-handover


def bare_core() -> Any:
    core: Any = object.__new__(EngineCore)
    core.mm_receiver_cache = None
    init_none_hash(sha256)
    core.request_block_hasher = get_request_block_hasher(16, sha256)
    return core


def test_prompt_handover_hook_stands_in_for_the_method() -> None:
    core, request = bare_core(), core_request()
    stock, wave = core.preprocess_add_request(request)
    patch_of("prompt-handover").apply()
    seen = []

    def receive(core: Any, request: Any, proceed: Any) -> Any:
        seen.append((core, request))
        return proceed(core, request)

    patch_of("prompt-handover").calls[0].set(receive)
    made, made_wave = core.preprocess_add_request(request)
    assert (made.block_hashes, made_wave) == (stock.block_hashes, wave)
    assert seen == [(core, request)]


def test_stock_hashes_a_prompt_from_its_first_block() -> None:
    core, starts = bare_core(), []
    hasher = core.request_block_hasher

    def record(request: Any) -> Any:
        starts.append(len(request.block_hashes))
        return hasher(request)

    core.request_block_hasher = record
    for prompt in (PROMPT, [*PROMPT, *PROMPT]):
        core.preprocess_add_request(core_request(prompt=prompt))
    assert starts == [0, 0]


# --- prompt-miss


def bare_core_process() -> Any:
    core: Any = object.__new__(EngineCoreProc)
    core.output_queue, core.engine_index = queue.Queue(), 0
    return core


def answers(core: Any) -> list[tuple[int, str, Any]]:
    found = []
    while not core.output_queue.empty():
        client_index, outputs = core.output_queue.get()
        found += [(client_index, o.request_id, o.finish_reason) for o in outputs.outputs]
    return found


def fail(core: Any, error: Exception) -> None:
    try:
        raise error
    except Exception:
        core._handle_request_preproc_error(core_request())


def test_prompt_miss_hook_may_answer_instead() -> None:
    core = bare_core_process()
    patch_of("prompt-miss").apply()
    fail(core, ValueError())
    assert answers(core) == [(0, "r", FinishReason.ERROR)]
    seen = []

    def answer(core: Any, request: Any) -> bool:
        seen.append((core, request.request_id))
        return len(seen) == 1

    patch_of("prompt-miss").calls[0].set(answer)
    fail(core, ValueError())
    assert answers(core) == []
    fail(core, ValueError())
    assert answers(core) == [(0, "r", FinishReason.ERROR)]
    assert seen == [(core, "r"), (core, "r")]


def test_stock_answers_whatever_goes_wrong_with_an_error() -> None:
    core = bare_core_process()
    fail(core, LookupError("no base"))
    assert answers(core) == [(0, "r", FinishReason.ERROR)]


# --- worker-ids


def handed_over(prefill: list[int] | None = None, uses_mrope: bool = False) -> NewRequestData:
    request = Request.from_engine_core_request(core_request(), None)
    return NewRequestData.from_request(request, ([1],), prefill, uses_mrope)


def test_worker_ids_hook_says_what_the_worker_is_told() -> None:
    stock = handed_over()
    patch_of("worker-ids").apply()
    assert handed_over() == stock
    seen = []

    def replace(request: Any, all_ids: Any, uses_mrope: bool) -> Any:
        seen.append((request.request_id, all_ids, uses_mrope))
        return "ids", all_ids and "all"

    patch_of("worker-ids").calls[0].set(replace)
    made = [handed_over(), handed_over([1]), handed_over(uses_mrope=True)]
    assert [data.prompt_token_ids for data in made] == ["ids"] * 3
    assert [data.prefill_token_ids for data in made] == [None, "all", None]
    assert seen == [("r", None, False), ("r", [1], False), ("r", None, True)]


def test_stock_hands_the_list_of_ids_to_the_worker() -> None:
    request = Request.from_engine_core_request(core_request(), None)
    assert NewRequestData.from_request(request, ([1],)).prompt_token_ids is request.prompt_token_ids


# --- reasoning-end


class CountedIds(list[int]):
    """Counts how many ids are looked at."""

    num_looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_looks += 1
        return super().__getitem__(index)


def has_ended(token_ids: list[int]) -> bool:
    parser: Any = SimpleNamespace(start_token_id=7, end_token_id=8)
    return bool(BaseThinkingReasoningParser.is_reasoning_end(parser, token_ids))


ENDINGS: list[tuple[list[int], bool]] = [
    ([], False),
    ([1], False),
    ([7, 1], False),
    ([7, 8, 1], True),
    ([7, 8, 7], False),
]


def test_reasoning_end_hook_answers_or_leaves_it_to_vllm() -> None:
    stock = [has_ended(ids) for ids, _ in ENDINGS]
    assert stock == [ended for _, ended in ENDINGS]
    patch_of("reasoning-end").apply()
    assert [has_ended(ids) for ids, _ in ENDINGS] == stock
    seen = []

    def answer(parser: Any, token_ids: Any) -> bool | None:
        seen.append((parser.end_token_id, token_ids))
        return True if token_ids == [1] else None

    patch_of("reasoning-end").calls[0].set(answer)
    assert [has_ended(ids) for ids, _ in ENDINGS] == [False, True, False, True, False]
    assert seen == [(8, ids) for ids, _ in ENDINGS]


def test_stock_looks_at_every_id_for_a_thinking_token() -> None:
    token_ids = CountedIds([1] * 1000)
    assert not has_ended(token_ids)
    assert token_ids.num_looks >= 1000
