# SPDX-License-Identifier: Apache-2.0
"""The routes of the API server over a simulated engine, on a port."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI
from recorded_engine import Engine

from vllm_stateful.adapters.frontend import session_routes


class Served:
    """What is served; the engine may be replaced by another one at any time."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine: Engine | None = None

    async def call(self, method: str, operation: str, arguments: dict[str, Any]) -> list[Any]:
        """As ``call_utility_all_async`` of vLLM's client: the answer of each engine core."""
        assert self.engine is not None
        return [self.engine.scheduler.stateful(operation, arguments)]


@contextmanager
def serving() -> Iterator[Served]:
    """While the routes are served."""
    app = FastAPI()
    app.include_router(session_routes.router)
    bound = socket.create_server(("127.0.0.1", 0))
    made = Served(f"http://127.0.0.1:{bound.getsockname()[1]}")
    core = SimpleNamespace(call_utility_all_async=made.call)
    app.state.engine_client = SimpleNamespace(engine_core=core)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield made
    finally:
        server.should_exit = True
        thread.join()
        bound.close()
