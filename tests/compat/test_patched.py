# SPDX-License-Identifier: Apache-2.0
"""Each patch against the installed vLLM: it fits, it opens its hook, empty it changes nothing.

The tests named ``test_stock_...`` are death notices: when one fails, vLLM has learned what the
patch is for, and the patch can go. The patches along the way of a prompt are in
``test_patched_prompts``.
"""

import asyncio
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from vllm import plugins
from vllm.config.scheduler import SchedulerConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest, AnthropicUsage
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser
from vllm.renderers import hf
from vllm.sampling_params import SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from vllm_stateful.compat.ledger import PATCHES, patch_of
from vllm_stateful.compat.patch import Patch, call_shape

OWNERS = {
    "anthropic-usage": AnthropicServingMessages,
    "cli-flags": EngineArgs,
    "engine-utility": EngineCore,
    "request-identity": InputProcessor,
    "scheduler-class": SchedulerConfig,
    "session-identity": GenerateBaseServing,
    "detokenizer-prompt": FastIncrementalDetokenizer,
    "prompt-send": AsyncMPClient,
    "prompt-answers": AsyncMPClient,
    "prompt-handover": EngineCore,
    "prompt-miss": EngineCoreProc,
    "worker-ids": NewRequestData,
    "reasoning-end": BaseThinkingReasoningParser,
    "finished-answer": OutputProcessor,
    "message-parsing": hf,
    "response-request": AsyncMPClient,
    "response-abort": AsyncMPClient,
    "response-outputs": OutputProcessor,
    "response-forget": AsyncMPClient,
    "request-state": RequestState,
    "staged-ids": StagedWriteTensor,
    "worker-speculator": model_runner,
    "worker-requests": model_runner.GPUModelRunner,
    "worker-batch": model_runner.GPUModelRunner,
    "worker-logits": gpu_model_runner,
    "worker-sampler": gpu_model_runner.GPUModelRunner,
}
pytestmark = pytest.mark.usefixtures("stock_vllm")
by_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)


def member(patch: Patch) -> Any:
    return vars(OWNERS[patch.name]).get(patch.target.replace(":", ".").rpartition(".")[2])


@by_patch
def test_signature_is_the_installed_one(patch: Patch) -> None:
    patch.check()
    if not patch.adds:
        function = getattr(member(patch), "__func__", member(patch))
        assert call_shape(function) == patch.signature


@by_patch
def test_apply_and_undo_leave_the_identical_object(patch: Patch) -> None:
    original = member(patch)
    patch.apply()
    assert member(patch) is not original
    patch.undo()
    assert member(patch) is original


# --- cli-flags


def build_parser() -> FlexibleArgumentParser:
    return EngineArgs.add_cli_args(FlexibleArgumentParser())


def test_cli_flags_open_the_parser() -> None:
    stock = set(build_parser()._option_string_actions)
    patch_of("cli-flags").apply()
    ours = set(build_parser()._option_string_actions)
    assert "--plugin" in ours - stock
    patch_of("cli-flags").calls[0].set(lambda parser: parser.add_argument("--of-a-plugin") and None)
    assert set(build_parser()._option_string_actions) == stock | {"--of-a-plugin"}


def test_stock_has_no_plugin_group_for_command_line_arguments() -> None:
    groups = {key: value for key, value in vars(plugins).items() if key.endswith("_GROUP")}
    assert len(groups) == 5, f"a new plugin group, is it for the command line? {groups}"
    assert "plugin" not in " ".join(EngineArgs.add_cli_args.__code__.co_names)


# --- scheduler-class


def scheduler_config(is_async: bool, **fields: Any) -> SchedulerConfig:
    return SchedulerConfig.default_factory(async_scheduling=is_async, **fields)


def chosen(**fields: Any) -> list[type[Any]]:
    return [scheduler_config(is_async, **fields).get_scheduler_cls() for is_async in (False, True)]


class SyncOnly(Scheduler):
    """Stands for a plugin's scheduler."""


def test_scheduler_class_hook_sees_the_stock_choice() -> None:
    assert chosen() == [Scheduler, AsyncScheduler]
    patch_of("scheduler-class").apply()
    seen: list[type[Any]] = []

    def choose(stock: type[Any]) -> type[Any]:
        seen.append(stock)
        return SyncOnly if stock is Scheduler else stock

    patch_of("scheduler-class").calls[0].set(choose)
    assert chosen() == [SyncOnly, AsyncScheduler]
    assert seen == [Scheduler, AsyncScheduler]


def test_stock_scheduler_cls_is_one_class_for_both_modes() -> None:
    assert chosen(scheduler_cls=SyncOnly) == [SyncOnly, SyncOnly]
    assert chosen() == [Scheduler, AsyncScheduler]
    assert not hasattr(SchedulerConfig, "default_scheduler_classes")


# --- session-identity

AGENT_HEADERS = {
    "x-claude-code-session-id": "claude",
    "session-id": "codex",
    "thread-id": "codex-thread",
    "x-parent-session-id": "opencode",
}


def http_request(**headers: str) -> Any:
    return SimpleNamespace(headers=headers)


def chat_request(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(messages=[{"role": "user", "content": "hi"}], **fields)


def session_ids() -> list[str | None]:
    find = GenerateBaseServing._get_session_id
    return [
        find(chat_request(session_id="body"), http_request()),
        find(chat_request(), http_request(**{"X-Session-ID": "header"})),
        find(chat_request(vllm_xargs={"session_id": "xargs"}), None),
        find(chat_request(), None),
    ]


def test_session_identity_hook_has_the_last_word() -> None:
    stock = session_ids()
    assert stock == ["body", "header", "xargs", None]
    patch_of("session-identity").apply()
    patch_of("session-identity").calls[0].set(
        lambda request, raw, found: found or (raw and raw.headers.get("session-id"))
    )
    assert session_ids() == stock
    raw = http_request(**AGENT_HEADERS)
    assert GenerateBaseServing._get_session_id(chat_request(), raw) == "codex"


def test_stock_does_not_read_the_headers_that_agents_send() -> None:
    raw = http_request(**AGENT_HEADERS)
    request = chat_request(user="u", prompt_cache_key="k")
    assert GenerateBaseServing._get_session_id(request, raw) is None


# --- request-identity


class BareInputProcessor(InputProcessor):
    """The real constructor and the real `process_inputs`, without a model."""

    def __init__(self, executor: ThreadPoolExecutor | None = None) -> None:
        model = SimpleNamespace(
            try_get_generation_config=dict,
            supports_multimodal_inputs=False,
            is_diffusion=False,
            enable_trace_replay=False,
        )
        parallel = SimpleNamespace(
            data_parallel_size=1, data_parallel_size_local=1, local_engines_only=False
        )
        config = MagicMock(model_config=model, parallel_config=parallel, watermark_config=None)
        renderer = SimpleNamespace(
            tokenizer=None, get_eos_token_id=lambda: None, _executor=executor
        )
        super().__init__(config, renderer)  # type: ignore[arg-type]

    def _build_logits_processors_params_validator(self) -> Callable[[SamplingParams], None]:
        return lambda params: None

    def _validate_params(self, *_: Any) -> bool:
        return False

    def _validate_model_inputs(self, *_: Any) -> None:
        """Nothing to check the prompt against."""


PROMPT: Any = {"type": "token", "prompt_token_ids": [1, 2, 3], "arrival_time": 7.0}


def process(**fields: Any) -> Any:
    params = SamplingParams(max_tokens=4)
    return BareInputProcessor().process_inputs("r", PROMPT, params, ("generate",), **fields)


def test_request_identity_hook_gets_the_finished_request() -> None:
    stock = process(session_id="s")
    patch_of("request-identity").apply()
    unchanged = process(session_id="s")
    assert repr(unchanged) == repr(stock)

    def salt(request: Any) -> Any:
        request.cache_salt = f"tenant of {request.session_id}"
        return request

    patch_of("request-identity").calls[-1].set(salt)
    assert process(session_id="s").cache_salt == "tenant of s"


def test_request_identity_covers_the_async_path() -> None:
    """vLLM makes process_inputs_async from the bound process_inputs, in the constructor."""

    async def process_async(processor: InputProcessor) -> Any:
        params = SamplingParams(max_tokens=4)
        return await processor.process_inputs_async("r", PROMPT, params, ("generate",))

    with ThreadPoolExecutor(1) as executor:
        patch_of("request-identity").apply()
        patch_of("request-identity").calls[-1].set(lambda request: ("hooked", request.request_id))
        assert asyncio.run(process_async(BareInputProcessor(executor))) == ("hooked", "r")


def test_stock_knows_no_sender_of_a_request() -> None:
    request = process(trace_headers={"authorization": "Bearer tenant-a"})
    assert request.cache_salt is None
    assert "key" not in call_shape(InputProcessor.process_inputs)
    assert not hasattr(InputProcessor, "request_hooks")


# --- engine-utility


def call_utility(*args: Any) -> Any:
    """Look up and decode as EngineCoreProc does with a utility call."""
    core = object.__new__(EngineCoreProc)
    method: Callable[..., Any] = core.stateful
    return method(*EngineCoreProc._convert_msgspec_args(method, args))


def test_engine_utility_reaches_the_hook_with_plain_arguments() -> None:
    patch_of("engine-utility").apply()
    patch_of("engine-utility").calls[0].set(
        lambda core, operation, arguments: {"core": type(core).__name__, operation: arguments}
    )
    result = call_utility("pin", {"blocks": [1, 2]})
    assert result == {"core": "EngineCoreProc", "pin": {"blocks": [1, 2]}}


def test_stock_engine_core_has_no_room_for_a_plugin_operation() -> None:
    assert not [name for name in dir(EngineCoreProc) if "plugin" in name or name == "stateful"]


# --- anthropic-usage

BREAKPOINT = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def messages_request() -> AnthropicMessagesRequest:
    text = {"type": "text", "text": "hi", **BREAKPOINT}
    return AnthropicMessagesRequest(
        model="m",
        max_tokens=3,
        messages=[{"role": "user", "content": [text]}],
        tools=[{"name": "f", "input_schema": {}, **BREAKPOINT}],
        metadata={"user_id": "user_1_session_2"},
        **BREAKPOINT,
    )


def answer_to(request: AnthropicMessagesRequest, raw_request: Any, answer: Any) -> Any:
    """What `create_messages` returns when the chat completion behind it is `answer`."""
    serving = object.__new__(AnthropicServingMessages)
    serving._merge_inline_system = False
    serving.disabled_thinking_effort_resolver = AsyncMock()  # from vLLM 0.33 on
    serving.create_chat_completion = AsyncMock(return_value=answer)
    return asyncio.run(serving.create_messages(request, raw_request))


def test_anthropic_usage_hook_has_the_last_word() -> None:
    error = ErrorResponse(error=ErrorInfo(message="m", type="t", code=400))
    assert answer_to(messages_request(), None, error) is error
    patch_of("anthropic-usage").apply()
    assert answer_to(messages_request(), None, error) is error
    patch_of("anthropic-usage").calls[0].set(lambda raw_request, answer: (raw_request, answer))
    assert answer_to(messages_request(), "raw", error) == ("raw", error)


def test_stock_drops_the_breakpoints_and_the_metadata_of_an_anthropic_request() -> None:
    """So both are read from the body, and the usage knows of no times."""
    request = messages_request()
    assert "ephemeral" not in request.model_dump_json()
    chat = AnthropicServingMessages.to_chat_completion_request(request)
    assert "user_1_session_2" not in chat.model_dump_json()
    assert "cache_creation" not in AnthropicUsage.model_fields
