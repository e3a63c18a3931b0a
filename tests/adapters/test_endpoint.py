# SPDX-License-Identifier: Apache-2.0
"""`DELETE /v1/sessions/{id}`: what the engines are asked, and what the client reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_stateful.adapters.frontend import endpoint
from vllm_stateful.adapters.frontend.identity import salt_of

SENT = "0a1b2c3d-session-of-mine"
KEY = {"Authorization": "Bearer a-key"}


def answered(*answers: dict[str, Any]) -> tuple[TestClient, list[tuple[str, dict[str, Any]]]]:
    """A client of an app whose engine cores answer so; and what these were asked."""
    asked: list[tuple[str, dict[str, Any]]] = []

    async def call(method: str, operation: str, arguments: dict[str, Any]) -> list[Any]:
        assert method == "stateful"
        asked.append((operation, arguments))
        return list(answers)

    app = FastAPI()
    app.include_router(endpoint.router)
    core = SimpleNamespace(call_utility_all_async=call)
    app.state.engine_client = SimpleNamespace(engine_core=core)
    return TestClient(app), asked


def test_the_clients_own_id_is_looked_for_wherever_it_may_have_sent_it() -> None:
    client, asked = answered({"closed": 1}, {"closed": 2})
    answer = client.delete(f"/v1/sessions/{SENT}", headers=KEY, params={"cache_salt": "s"})
    assert (answer.status_code, answer.json()) == (200, {"session_id": SENT, "closed": 3})
    ((operation, arguments),) = asked
    assert operation == "close"
    assert arguments["cache_salt"] == salt_of({"authorization": "Bearer a-key"}, "s")
    ids = arguments["session_ids"]
    for expected in (SENT, f"codex:{SENT}", f"prompt-cache-key:{SENT}", f"claude-code:{SENT}"):
        assert expected in ids
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("answers", "status", "said"),
    [
        (({"closed": 0},), 404, SENT),
        (({"closed": 0}, {"off": "no caching"}), 404, SENT),
        (({"off": "no caching"}, {"off": "no caching"}), 501, "off: no caching"),
    ],
)
def test_an_error_has_the_form_of_vllms(
    answers: tuple[dict[str, Any], ...], status: int, said: str
) -> None:
    client, _ = answered(*answers)
    answer = client.delete(f"/v1/sessions/{SENT}")
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == status
    assert said in error["message"]
