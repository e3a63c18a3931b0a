# SPDX-License-Identifier: Apache-2.0
"""The API server's part of a chat turn in this process, and a clock for each stage of it."""

import asyncio
import functools
import importlib
import inspect
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers, State
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.chat_completion.api_router import router
from vllm.plugins import load_general_plugins
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.renderers.registry import renderer_from_config
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.serial_utils import MsgpackEncoder

from benchmarks.models import TOOLS_TEMPLATE
from vllm_stateful.config import is_enabled

CHAT_PATH = "/v1/chat/completions"
ENGINES = (b"engine-0", b"engine-1")
TOTAL = "total without the JSON"

INSIDE = {
    "parse": "vllm.renderers.hf:parse_chat_messages_async",
    "  images of the messages": "vllm_stateful.adapters.frontend.messages:images_of",
    "  find": "vllm_stateful.render.message_memory:MessageMemory.find",
    "  keep": "vllm_stateful.render.message_memory:MessageMemory.keep",
    "  key of template and tools": (
        "vllm_stateful.adapters.frontend.messages:ChatRenderer._template_of"
    ),
    "  new messages": "vllm_stateful.adapters.frontend.messages:continued_text",
    "incremental tokenizer": (
        "vllm_stateful.render.incremental_tokenizer:IncrementalTokenizer.tokenize"
    ),
    "  find text": "vllm_stateful.render.text_memory:TextMemory.find",
    "  keep text": "vllm_stateful.render.text_memory:TextMemory.keep",
    "  list of ids": "vllm_stateful.render.incremental_tokenizer:IncrementalTokenizer._continue",
    "tools of the response cache": "vllm_stateful.adapters.frontend.identity:digest_of_tools",
    "name of the conversation": "vllm_stateful.adapters.frontend.session_affinity:opening",
    "wish": "vllm_stateful.adapters.frontend.identity:wish_of",
    "choice of the engine core": "vllm_stateful.adapters.frontend.session_affinity:choose",
    "what to send": "vllm_stateful.adapters.frontend.prompt_sender:pack",
}
"""Parts of stages, by name; those that this side does not have are left out."""


class Clock:
    """CPU time of this process by stage, since the last ``take``.

    Not wall time: others may use the same cores.
    """

    def __init__(self) -> None:
        self._spent: Counter[str] = Counter()
        self._parts: dict[str, dict[str, None]] = defaultdict(dict)
        self._stage = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stage = name
        self._spent[name] += 0
        started = time.process_time()
        yield
        self._spent[name] += time.process_time() - started

    def watch(self, part: str, target: str) -> None:
        """Put a timer around a function, where it exists."""
        module, _, path = target.partition(":")
        owner: Any = importlib.import_module(module)
        *owners, name = path.split(".")
        for each in owners:
            owner = getattr(owner, each)
        if hasattr(owner, name):
            function = inspect.getattr_static(owner, name)
            is_static = isinstance(function, staticmethod)
            timed = self._timed(part, function.__func__ if is_static else function)
            setattr(owner, name, staticmethod(timed) if is_static else timed)

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def note(started: float) -> None:
            self._spent[part] += time.process_time() - started
            self._parts[self._stage][part] = None

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                note(started)

        @functools.wraps(function)
        async def timed_async(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return await function(*args, **kwargs)
            finally:
                note(started)

        return timed_async if inspect.iscoroutinefunction(function) else timed

    def take(self, total: str, leaving_out: str) -> dict[str, float]:
        """Every stage, with its parts behind it, and the sum of the stages."""
        stages = [name for name in self._spent if name not in INSIDE]
        found = {}
        for name in stages:
            found[name] = self._spent[name] * 1e6
            parts = (part for part in INSIDE if part in self._parts[name])
            found |= {f"    {part}": self._spent[part] * 1e6 for part in parts}
        found[total] = sum(self._spent[name] * 1e6 for name in stages if name != leaving_out)
        self._spent.clear()
        return found


class Client(AsyncMPClient):  # type: ignore[misc]
    """A client of two engine cores that takes what would go over the wire."""

    def __init__(self) -> None:
        self.encoder = MsgpackEncoder()
        self.core_engines, self.core_engine = list(ENGINES), ENGINES[0]
        self.client_count = 1
        self.lb_engines = [[0, 0, 0.0] for _ in ENGINES]
        self.engine_inflight = dict.fromkeys(ENGINES, 0)
        self.num_bytes = 0

    def _send_input_message(self, message: Any, engine: Any) -> Any:
        self.num_bytes = sum(len(part) for part in message)

    async def _call_utility_async(self, *_: Any, **__: Any) -> Any:
        return {"ready": True}

    def __del__(self) -> None:
        """There is nothing to shut down."""


class HostPath:
    """Everything of the API server that a chat request passes, but for HTTP.

    Args:
        model: its folder.
    """

    def __init__(self, model: str) -> None:
        load_general_plugins()
        self.is_ours = is_enabled()
        config = EngineArgs(model=model, dtype="float32").create_engine_config()
        self.renderer = renderer_from_config(config)
        self.online = OnlineRenderer(
            config.model_config,
            self.renderer,
            request_logger=None,
            chat_template=TOOLS_TEMPLATE.read_text(),
            chat_template_content_format="auto",
            enable_auto_tools=True,
            tool_parser="hermes",
        )
        self.inputs = InputProcessor(config, self.renderer)
        self.outputs = OutputProcessor(self.renderer.tokenizer, log_stats=False)
        self.client = Client()
        self.clock = Clock()
        freeze_gc_heap()  # as the server does when it has started
        app = FastAPI()
        app.include_router(router)
        if self.is_ours:
            from vllm_stateful.adapters.frontend.request_validation import validate_plain_messages

            assert validate_plain_messages(app)
        (self._field,) = next(
            route.dependant.body_params
            for route in app.router.routes
            if getattr(route, "path", None) == CHAT_PATH
        )

    def measure(self, bodies: Iterator[bytes]) -> list[dict[str, float]]:
        """Microseconds of each stage, for each of these turns."""
        for part, target in INSIDE.items():
            if self.is_ours or target.startswith("vllm."):
                self.clock.watch(part, target)
        return asyncio.run(self._measure(bodies))

    async def _measure(self, bodies: Iterator[bytes]) -> list[dict[str, float]]:
        if self.is_ours:
            from vllm_stateful.adapters.frontend import session_affinity
            from vllm_stateful.adapters.frontend.prompt_sender import ask_for_deltas

            session_affinity.watch(self.client, sees_sent=True)
            ask_for_deltas(self.client)
        found = []
        for number, body in enumerate(bodies):
            await asyncio.sleep(0.02)
            await self._turn(f"chatcmpl-{number}", body)
            found.append(self.clock.take(TOTAL, "JSON of the body"))
        return found

    async def _turn(self, request_id: str, body: bytes) -> None:
        stage = self.clock.stage
        headers = Headers({"authorization": "Bearer a-key"})
        if self.is_ours:
            from vllm_stateful.adapters.frontend import response_key, turn_context

            turn_context.begin("", turn_context.CacheControl.of(headers))
        with stage("JSON of the body"):
            value = json.loads(body)
        with stage("validation"):
            request, errors = self._field.validate(value, {}, loc=("body",))
        assert not errors
        with stage("render and tokenize"):
            _, (prompt,) = await self.online.render_chat(request)
        params = request.to_sampling_params(64, {})
        raw: Any = SimpleNamespace(headers=headers, _json=value, state=State(), app=None)
        with stage("session identity"):
            session_id = GenerateBaseServing._get_session_id(request, raw)
        with stage("request to the engine"):
            made = self.inputs.process_inputs(
                request_id, prompt, params, ("generate",), session_id=session_id
            )
            self.inputs.assign_request_id(made)
        with stage("state and detokenizer"):
            self.outputs.add_request(made, prompt.get("prompt"))
        if self.is_ours:
            rank, made.data_parallel_rank = made.data_parallel_rank, None
            with stage("key of the response cache"):
                assert isinstance(response_key.key_of(made, turn_context.current()), bytes)
            made.data_parallel_rank = rank
        with stage("send"):
            engine = ENGINES[made.data_parallel_rank or 0]
            self.client._send_input(EngineCoreRequestType.ADD, made, engine)
        with stage("text of the first token"):
            self.outputs.request_states[made.request_id].detokenizer.update([198], False)
        self.outputs.abort_requests([made.request_id], internal=True)
