# SPDX-License-Identifier: Apache-2.0
"""Behind vLLM's Rust frontend the engine keeps sessions; what it leaves is said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer
from local_models import TINY

BINARY = Path(str(find_spec("vllm").origin)).with_name("vllm-rs")  # type: ignore[union-attr]

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not BINARY.exists(), reason="this build of vLLM has no Rust frontend"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    if not (TINY / "config.json").exists():
        pytest.skip("the tiny model is not built: run `make model`")
    log = tmp_path_factory.mktemp("rust") / "server.log"
    options = ["--plugin", "stateful", "--max-model-len", "1024", "--served-model-name", "tiny"]
    options += ["--stateful-check-invariants"]
    environment = {"VLLM_USE_RUST_FRONTEND": "1"}
    with LiveServer(TINY, log, *options, environment=environment) as live:
        yield live


def ask(server: LiveServer, prompt: Any, **more: Any) -> tuple[list[int], int]:
    """Token ids of the answer, and tokens of the prompt that were there."""
    headers = more.pop("headers", {})
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 5, "temperature": 0}
    asked |= {"return_token_ids": True, "ignore_eos": True, **more}
    made = httpx.post(f"{server.url}/v1/completions", json=asked, headers=headers, timeout=60)
    assert made.status_code == 200, made.text
    answer = made.json()
    details = answer["usage"].get("prompt_tokens_details") or {}
    return answer["choices"][0]["token_ids"], details.get("cached_tokens") or 0


@pytest.mark.parametrize("headers", [{}, {"X-Session-ID": "a-session-of-mine"}])
def test_a_turn_resumes_to_the_token(server: LiveServer, headers: dict[str, str]) -> None:
    history = [7 + number % (50 + len(headers)) for number in range(300)]
    answer, _ = ask(server, history, headers=headers)
    for turn in range(3):
        before = len(history) + len(answer)
        history = [*history, *answer, 9, 8, turn]
        answer, cached = ask(server, history, headers=headers)
        assert cached == before - 1


def test_a_salt_keeps_tenants_apart(server: LiveServer) -> None:
    prompt = [11 + number % 40 for number in range(300)]
    ask(server, prompt, cache_salt="one")
    assert ask(server, [*prompt, 5], cache_salt="other")[1] == 0
    assert ask(server, [*prompt, 5], cache_salt="one")[1] == 300


def test_it_says_what_is_left_out(server: LiveServer) -> None:
    said = server.log.read_text()
    assert said.count("stateful: behind the Rust frontend sessions are told by session id") == 1
    assert "stateful: on, sessions may pin" in said
    assert "Traceback" not in said
