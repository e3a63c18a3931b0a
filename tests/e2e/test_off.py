# SPDX-License-Identifier: Apache-2.0
"""On a vLLM that is not supported, a server with the plugin is a server without it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_server import LiveServer
from local_models import TINY

pytestmark = pytest.mark.e2e

ANOTHER_VLLM = """
from vllm_stateful.compat import probe

probe.SUPPORTED = ((0, 1),)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    if not (TINY / "config.json").exists():
        pytest.skip("the tiny model is not built: run `make model`")
    folder: Path = tmp_path_factory.mktemp("off")
    (folder / "sitecustomize.py").write_text(ANOTHER_VLLM)
    options = ["--plugin", "stateful", "--stateful-idle-seconds", "60", "--max-model-len", "1024"]
    options += ["--served-model-name", "tiny"]
    environment = {"PYTHONPATH": str(folder)}
    with LiveServer(TINY, folder / "server.log", *options, environment=environment) as live:
        yield live


def test_it_answers_as_stock(server: LiveServer) -> None:
    asked = {"model": "tiny", "prompt": "one two three " * 30, "max_tokens": 4}
    for _ in range(2):
        answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["usage"].get("prompt_tokens_details") is None


def test_it_has_no_route_and_no_metric_of_ours(server: LiveServer) -> None:
    assert "vllm_stateful" not in httpx.get(f"{server.url}/metrics").text
    answer = httpx.delete(f"{server.url}/v1/sessions/a-session-of-mine")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})


def test_it_says_so_once_and_nothing_else(server: LiveServer) -> None:
    time.sleep(3)  # the poll for metrics asked once a second
    said = server.log.read_text()
    assert said.count("stateful: off, serving as stock vLLM: vLLM") == 1
    assert "Traceback" not in said
    assert "Unknown vLLM environment variable" not in said
