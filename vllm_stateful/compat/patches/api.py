# SPDX-License-Identifier: Apache-2.0
"""Patches for the API server: from the HTTP request to the engine's client, and back.

Each wrapper gets vLLM's function and our hooks (`Hook`), and returns the replacement.
"""

from collections.abc import Callable
from typing import Any

from vllm_stateful.compat.hook import Hook
from vllm_stateful.compat.patch import Patch


def _cli_flags(original: Callable[..., Any], extend: Hook) -> Callable[..., Any]:
    """Add the plugin's options to vLLM's command line, as in ``vllm serve --plugin stateful``.

    ``extend``: gets each parser to which vLLM has added its engine arguments, and adds ours.
    """

    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        extend(parser)
        return parser

    return add_cli_args


def _session_identity(original: Callable[..., Any], identify: Hook) -> Callable[..., Any]:
    """Read session ids that agents send under names that vLLM does not read.

    ``identify``: gets the parsed request, the raw HTTP request (may be None) and the id that vLLM
    found; returns the id to use. Runs once per request in the API server, before the prompt
    reaches the engine.
    """

    def _get_session_id(request: Any, raw_request: Any) -> str | None:
        found: str | None = identify(request, raw_request, original(request, raw_request))
        return found

    return _get_session_id


def _request_identity(
    original: Callable[..., Any], prepare: Hook, stamp: Hook
) -> Callable[..., Any]:
    """Put onto a request who sent it, just before it leaves the API process.

    ``InputProcessor.process_inputs_async`` runs this same function in a thread pool. An
    InputProcessor takes the bound method when it is built, so this patch must be applied before.
    The caller's context variables are not visible in the thread pool, but HTTP requests arrive
    rendered and do not use it.

    ``prepare``: gets the InputProcessor before it validates the request.

    ``stamp``: gets the finished EngineCoreRequest; may change it, and returns the one to send.
    """

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepare(self)
        return stamp(original(self, *args, **kwargs))

    return process_inputs


def _message_parsing(original: Callable[..., Any], parse: Hook) -> Callable[..., Any]:
    """Parse only the new messages; stock vLLM parses all messages of a conversation each turn.

    ``parse``: gets the original function, then its arguments; is awaited, and returns what the
    original function returns.
    """

    async def parse_chat_messages_async(
        messages: Any,
        model_config: Any,
        content_format: Any,
        media_io_kwargs: Any = None,
        mm_processor_kwargs: Any = None,
    ) -> Any:
        arguments = (model_config, content_format, media_io_kwargs, mm_processor_kwargs)
        return await parse(original, messages, *arguments)

    return parse_chat_messages_async


def _anthropic_usage(
    original: Callable[..., Any], with_usage: Hook, with_diagnostics: Hook
) -> Callable[..., Any]:
    """Tell an Anthropic client how long its conversation is kept, and where it was changed.

    ``with_usage``: gets the raw HTTP request (may be None) and vLLM's answer to it (a response, an
    error, or the events of a stream as an async generator); returns the answer to send.

    ``with_diagnostics``: gets the raw HTTP request and what ``with_usage`` returned; returns the
    answer to send.
    """

    async def create_messages(self: Any, request: Any, raw_request: Any | None = None) -> Any:
        answer = with_usage(raw_request, await original(self, request, raw_request))
        return with_diagnostics(raw_request, answer)

    return create_messages


def _detokenizer_prompt(original: Callable[..., Any], with_tail: Hook) -> Callable[..., Any]:
    """Prime the detokenizer with the end of the prompt; stock vLLM makes it decode all of it.

    ``with_tail``: gets the tokenizer and the EngineCoreRequest; returns the request with whose
    prompt the detokenizer is primed.
    """

    def __init__(self: Any, tokenizer: Any, request: Any) -> None:
        original(self, tokenizer, with_tail(tokenizer, request))

    return __init__


def _reasoning_end(original: Callable[..., Any], look_up: Hook) -> Callable[..., Any]:
    """Look up whether reasoning has ended; stock vLLM searches the whole prompt from its end.

    ``look_up``: gets the reasoning parser and the token ids; returns the answer, or None to
    search.
    """

    def is_reasoning_end(self: Any, input_ids: Any) -> bool:
        known: bool | None = look_up(self, input_ids)
        return bool(original(self, input_ids)) if known is None else known

    return is_reasoning_end


def _finished_answer(original: Callable[..., Any], note: Hook) -> Callable[..., Any]:
    """Note the ids of a finished answer, so that the next turn can keep them.

    ``note``: gets the state of a request that was answered to its end and not aborted.
    """

    def _finish_request(self: Any, req_state: Any) -> None:
        original(self, req_state)
        note(req_state)

    return _finish_request


def _request_state(original: Callable[..., Any], maker_of: Hook) -> Callable[..., Any]:
    """End a turn behind its last allowed tool call, or in a call that is already invalid.

    ``maker_of``: gets vLLM's class of request states and an EngineCoreRequest; returns what makes
    the request's state: that class, or something with the same parameters.
    """

    def from_new_request(
        cls: Any,
        tokenizer: Any,
        request: Any,
        prompt: Any,
        parent_req: Any,
        request_index: Any,
        queue: Any,
        log_stats: Any,
        stream_interval: Any,
    ) -> Any:
        rest = (prompt, parent_req, request_index, queue, log_stats, stream_interval)
        return original(maker_of(cls, request), tokenizer, request, *rest)

    return from_new_request


PATCHES = (
    Patch(
        name="cli-flags",
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        wrap=_cli_flags,
        calls=(Hook("vllm_stateful.adapters.frontend.command_line:extend_parser"),),
        symptom="A general plugin cannot add flags to `vllm serve`.",
        reason="vLLM loads general plugins just before it builds this parser, but then offers the "
        "parser to platform plugins only (current_platform.pre_register_and_update).",
        feature="cli",
        process="api",
        signature="(parser)",
        upstream="vllm-0.32/0001-cli-flags.patch",
        remove_when="vLLM has an entry point group for functions that add command line arguments.",
    ),
    Patch(
        name="session-identity",
        target="vllm.entrypoints.generate.base.serving:GenerateBaseServing._get_session_id",
        wrap=_session_identity,
        calls=(Hook("vllm_stateful.adapters.frontend.identity:identify"),),
        symptom="Only `session_id`, `X-Session-ID` and `vllm_xargs.session_id` name a session; "
        "agents send other headers and are taken for strangers at every turn.",
        reason="Chat, completions and responses all ask this one function, and no seam lets a "
        "plugin answer; a middleware could only rewrite headers, without seeing the parsed body.",
        feature="sessions",
        process="api",
        signature="(request, raw_request)",
        upstream="vllm-0.32/0003-session-identity.patch",
        remove_when="a plugin can register where a session id comes from.",
    ),
    Patch(
        name="request-identity",
        target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        wrap=_request_identity,
        calls=(
            Hook("vllm_stateful.adapters.speculation:take_all_parameters"),
            Hook("vllm_stateful.adapters.frontend.identity:stamp"),
        ),
        symptom="The API key of a request never reaches the engine, so two tenants share KV "
        "blocks. min_p and logit_bias are refused beside any drafts.",
        reason="`cache_salt` would keep them apart, but only clients can set it, and nothing "
        "between the HTTP request and the engine can be extended.",
        feature="sessions",
        process="api",
        signature="(self, request_id, prompt, params, supported_tasks, arrival_time=..., "
        "lora_request=..., tokenization_kwargs=..., trace_headers=..., priority=..., "
        "data_parallel_rank=..., resumable=..., session_id=..., kv_hints=...)",
        upstream="vllm-0.32/0004-request-identity.patch",
        remove_when="a plugin can see each EngineCoreRequest before it is sent.",
    ),
    Patch(
        name="message-parsing",
        target="vllm.renderers.hf:parse_chat_messages_async",
        wrap=_message_parsing,
        calls=(Hook("vllm_stateful.adapters.frontend.messages:parse_new_messages"),),
        symptom="A turn of a conversation of 400 messages blocks the event loop for 2 ms while all "
        "of them are parsed again.",
        reason="The function parses one message after the other, each on its own, but is only ever "
        "given all of them; it is called in the middle of a method that is better not copied.",
        feature="messages",
        process="api",
        signature="async (messages, model_config, content_format, media_io_kwargs=..., "
        "mm_processor_kwargs=...)",
        upstream="vllm-0.32/0012-message-parsing.patch",
        remove_when="vLLM parses only the messages that a turn adds.",
    ),
    Patch(
        name="anthropic-usage",
        target="vllm.entrypoints.anthropic.serving:AnthropicServingMessages.create_messages",
        wrap=_anthropic_usage,
        calls=(
            Hook("vllm_stateful.adapters.frontend.anthropic_usage:with_cache_creation"),
            Hook("vllm_stateful.adapters.frontend.anthropic_usage:with_diagnostics"),
        ),
        symptom="`cache_control` and `diagnostics` of POST /v1/messages are dropped: a client that "
        "asks for a cache of one hour cannot see whether it got one, nor why its prefix was not "
        "reused.",
        reason="The request and its answer are together only here. A middleware sees bytes, and "
        "would have to decode each response and encode it again.",
        feature="anthropic-usage",
        process="api",
        signature="async (self, request, raw_request=...)",
        upstream="vllm-0.32/0006-anthropic-usage.patch",
        remove_when="vLLM answers `cache_control` with `usage.cache_creation`, and `diagnostics`.",
    ),
    Patch(
        name="detokenizer-prompt",
        target="vllm.v1.engine.detokenizer:FastIncrementalDetokenizer.__init__",
        wrap=_detokenizer_prompt,
        calls=(Hook("vllm_stateful.adapters.frontend.detokenizer:with_prompt_tail"),),
        symptom="The first token of a 100k-token prompt blocks the API server's event loop for 32 "
        "ms: every other stream stalls.",
        reason="`DecodeStream` is primed with all prompt token ids and decodes them all at its "
        "first step; the last few dozen would do. The class is chosen by the tokenizer's type.",
        feature="detokenize",
        process="api",
        signature="(self, tokenizer, request)",
        upstream="vllm-0.32/0007-detokenizer-prompt.patch",
        remove_when="vLLM primes its detokenizer with the tail of the prompt.",
    ),
    Patch(
        name="reasoning-end",
        target="vllm.reasoning.basic_parsers:BaseThinkingReasoningParser.is_reasoning_end",
        wrap=_reasoning_end,
        calls=(Hook("vllm_stateful.adapters.frontend.reasoning_end:is_reasoning_end"),),
        symptom="With a reasoning parser, a Python loop runs backwards over the prompt, on the "
        "event loop: to its start when no thinking token is in it (2 ms for 100k tokens).",
        reason="The parser is given a list of ids and cannot know that all but its end was "
        "searched in the turn before.",
        feature="reasoning",
        process="api",
        signature="(self, input_ids)",
        upstream="vllm-0.32/0010-reasoning-end.patch",
        remove_when="vLLM searches the prompt for thinking tokens only where it is new.",
    ),
    Patch(
        name="finished-answer",
        target="vllm.v1.engine.output_processor:OutputProcessor._finish_request",
        wrap=_finished_answer,
        calls=(Hook("vllm_stateful.adapters.frontend.renderer:note_answer"),),
        symptom="A tool call comes back in the history with other white space in its JSON, hence "
        "other token ids: its KV is useless and it is computed again.",
        reason="The generated ids of every endpoint pass here, before they become text; no plugin "
        "is told that a request has finished.",
        feature="history",
        process="api",
        signature="(self, req_state)",
        upstream="vllm-0.32/0011-finished-answer.patch",
        remove_when="a plugin is told the token ids of each finished request in the API server.",
    ),
    Patch(
        name="request-state",
        target="vllm.v1.engine.output_processor:RequestState.from_new_request",
        wrap=_request_state,
        calls=(Hook("vllm_stateful.adapters.frontend.tool_call_check:state_maker"),),
        symptom="With parallel_tool_calls false or a named tool the model may go on behind the one "
        "call, and an invalid call is seen by nobody before its end.",
        reason="Where text appears and stop strings are found, nothing else can end a turn; logits "
        "processors see only token ids, and finish in the engine with no reason of their own.",
        feature="tool-call-check",
        process="api",
        signature="(cls, tokenizer, request, prompt, parent_req, request_index, queue, log_stats, "
        "stream_interval)",
        upstream="vllm-0.32/0014-request-state.patch",
        remove_when="a plugin can end a turn by its text and say why.",
    ),
)
