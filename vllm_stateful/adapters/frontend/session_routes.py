# SPDX-License-Identifier: Apache-2.0
"""HTTP routes: the sessions of a client, and what became of their turns.

A client sees only sessions with its own API key and ``cache_salt``. The salt is a parameter. A
client with the operator's key (``--stateful-admin-key``) sees the sessions of all tenants. That key
must be one of the server's own (``--api-key``), which vLLM checks before any of these routes.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from secrets import compare_digest
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

from vllm_stateful.adapters.frontend.identity import salt_of
from vllm_stateful.config import process_config
from vllm_stateful.request.session_identity import ids_of_client, key_of_client
from vllm_stateful.session.sentences import explained
from vllm_stateful.session.session_book import MAX_SESSIONS
from vllm_stateful.transport.wire import CLOSE, SESSION, SESSIONS, TURN, TURNS

router = APIRouter(tags=["sessions"])

MAX_LIMIT = 200
"""The most entries of one answer. The engine core makes them between two steps."""

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT)]
Skip = Annotated[int, Query(ge=0, le=MAX_SESSIONS)]


_one_at_a_time = asyncio.Semaphore(1)


class Missed(BaseModel):
    """Why a turn computed what an earlier turn had computed (``session.Missed``)."""

    cause: str
    num_tokens: int
    num_behind_snapshot: int = 0
    token: int | None = None
    message: int | None = None
    kind: str | None = None
    why_gone: str | None = None
    gone_s: float | None = None
    idle_s: float | None = None
    before: str | None = None
    now: str | None = None


class Said(BaseModel):
    """What the client said of its turn (``session.Said``)."""

    source: str
    parent: str | None
    compaction: bool
    rejected: str | None
    retry: int
    window: int | None
    merged: int


class Turn(BaseModel):
    """One turn; durations in seconds (``session.TurnRecord``)."""

    request_id: str
    session_id: str
    session: str
    tenant: str
    arrived_at: float
    outcome: str
    prompt_tokens: int
    reused_tokens: int
    loaded_tokens: int
    computed_tokens: int
    output_tokens: int
    drafted_tokens: int
    accepted_draft_tokens: int
    missed: Missed
    waited_for: str | None
    waited_s: float | None
    queue_s: float | None
    lookup_s: float
    first_token_s: float | None
    decode_s: float | None
    ended: str | None
    kept: bool
    said: Said
    window_before: int | None
    explanation: list[str]
    """In plain English: first what it reused, then why not more, and last how long it took."""


class Session(BaseModel):
    """One session; durations in seconds."""

    session_id: str
    session: str
    tenant: str
    lora: str | None
    state: str
    waits_for: str | None
    turns: int
    running: int
    age_s: float
    idle_s: float
    tokens: int
    blocks: int
    own_blocks: int | None
    """Of these, blocks that no other session and no running turn holds."""
    branches: int
    resume_points: int
    returns: float | None
    eviction_place: int | None = None
    """How many sessions of its client and engine core are to give back all their KV before it does;
    the operator is told of all sessions. Told of one session, not of a list. Null while a
    turn of it runs."""
    parent: str | None
    children: list[str]
    demoted: str | None
    last_turn: Turn | None


class Pool(BaseModel):
    """Blocks of the KV cache: all, free ones, and those that waiting sessions alone keep."""

    total: int
    free: int
    kept: int


class Sessions(BaseModel):
    """Sessions, the one with the last turn first. Only the operator is told of the pool."""

    sessions: list[Session]
    pool: Pool | None = None


class Turns(BaseModel):
    """Turns, the newest first."""

    turns: list[Turn]


class Closed(BaseModel):
    """How many branches of a session were dropped."""

    session_id: str
    closed: int


@router.get("/v1/sessions", response_model=Sessions)
async def list_sessions(
    raw_request: Request, cache_salt: str | None = None, limit: Limit = 100, skip: Skip = 0
) -> Any:
    """The client's sessions, the one with the last turn first.

    Args:
        cache_salt: What the sessions' requests have in the field of that name.
        limit: Sessions of one answer.
        skip: Sessions that an earlier answer had. With several engine cores the first 200
            sessions can be listed.
    """
    found = await _ask(raw_request, SESSIONS, cache_salt, limit=limit, skip=skip)
    if isinstance(found, JSONResponse):
        return found
    if len(found) == 1:
        return {"sessions": _sessions(found), "pool": _pool(found)}
    most = min(skip + limit, MAX_LIMIT)  # each engine core may have all that are wanted
    found = await _ask(raw_request, SESSIONS, cache_salt, limit=most)
    if isinstance(found, JSONResponse):
        return found
    listed = sorted(_sessions(found), key=lambda each: each["idle_s"])
    return {"sessions": listed[skip : skip + limit], "pool": _pool(found)}


@router.get("/v1/sessions/{session_id:path}/turns", response_model=Turns)
async def list_turns(
    session_id: str, raw_request: Request, cache_salt: str | None = None, limit: Limit = 100
) -> Any:
    """The turns of a session that are remembered, the newest first."""
    asked = {"session_ids": ids_of_client(session_id), "limit": limit}
    found = await _ask(raw_request, TURNS, cache_salt, **asked)
    if isinstance(found, JSONResponse):
        return found
    turns = sorted(_turns(found), key=lambda each: -each["arrived_at"])
    return {"turns": turns[:limit]} if turns else _unknown("session", session_id)


@router.get("/v1/sessions/{session_id:path}", response_model=Session)
async def show_session(session_id: str, raw_request: Request, cache_salt: str | None = None) -> Any:
    """One session: its state, what it keeps, where it came from, and its last turn.

    Args:
        session_id: As the client named it, in whichever header or field. A sub-agent of Claude
            Code is ``ROOT/AGENT``.
        cache_salt: What the session's requests have in the field of that name.
    """
    ids = ids_of_client(session_id)
    found = await _ask(raw_request, SESSION, cache_salt, session_ids=ids)
    if isinstance(found, JSONResponse):
        return found
    sessions = sorted(_sessions(found), key=lambda each: each["idle_s"])
    return sessions[0] if sessions else _unknown("session", session_id)


@router.get("/v1/turns", response_model=Turns)
async def list_all_turns(
    raw_request: Request, cache_salt: str | None = None, limit: Limit = 100
) -> Any:
    """The client's turns that are remembered, the newest first."""
    found = await _ask(raw_request, TURNS, cache_salt, limit=limit)
    if isinstance(found, JSONResponse):
        return found
    turns = sorted(_turns(found), key=lambda each: -each["arrived_at"])
    return {"turns": turns[:limit]}


@router.get("/v1/turns/{request_id}", response_model=Turn)
async def show_turn(request_id: str, raw_request: Request, cache_salt: str | None = None) -> Any:
    """One turn: what it reused, why not more, and how long each part took.

    Args:
        request_id: The ``id`` of the answer, or the request's id in vLLM's log.
        cache_salt: What the request had in the field of that name.
    """
    found = await _ask(raw_request, TURN, cache_salt, request_id=request_id)
    if isinstance(found, JSONResponse):
        return found
    turns = _turns(found)
    return turns[0] if turns else _unknown("turn", request_id)


@router.delete("/v1/sessions/{session_id:path}", response_model=Closed)
async def close_session(
    session_id: str, raw_request: Request, cache_salt: str | None = None
) -> Any:
    """Release what a session keeps; its next turn starts cold.

    Args:
        session_id: As for ``GET``.
        cache_salt: As for ``GET``.

    Returns:
        How many branches were dropped, or an error in vLLM's form. 404: nothing is kept. 501: the
        engine serves as stock vLLM, and why. The error is not raised, because vLLM logs raised
        errors with their stack.
    """
    salt = salt_of(raw_request.headers, cache_salt)
    arguments = {"session_ids": ids_of_client(session_id), "cache_salt": salt}
    results = await _ask_engines(raw_request, CLOSE, arguments)
    if isinstance(results, JSONResponse):
        return results
    closed = sum(result["closed"] for result in results)
    if closed == 0:
        return _error(HTTPStatus.NOT_FOUND, f"no resident session {session_id!r}")
    return {"session_id": session_id, "closed": closed}


async def _ask(
    raw_request: Request, operation: str, cache_salt: str | None, **arguments: Any
) -> list[dict[str, Any]] | JSONResponse:
    """The answers of all engine cores to the sender of a request."""
    arguments["cache_salt"] = salt_of(raw_request.headers, cache_salt)
    arguments["sees_all"] = _is_operator(raw_request)
    return await _ask_engines(raw_request, operation, arguments)


async def _ask_engines(
    raw_request: Request, operation: str, arguments: dict[str, Any]
) -> list[dict[str, Any]] | JSONResponse:
    """The answers of the engine cores that keep sessions; an error if none does."""
    client = raw_request.app.state.engine_client
    async with _one_at_a_time:  # the engine cores answer all that were asked before they go on
        results = await ask_all(client, operation, arguments)
    live = [result for result in results if "off" not in result]
    if results and not live:
        return _error(HTTPStatus.NOT_IMPLEMENTED, f"off: {results[0]['off']}")
    return live


async def ask_all(engine_client: Any, operation: str, arguments: dict[str, Any]) -> list[Any]:
    """One answer per engine core; there are several with data parallelism."""
    core = engine_client.engine_core
    return list(await core.call_utility_all_async("stateful", operation, arguments))


def _is_operator(raw_request: Request) -> bool:
    expected = process_config().admin_key
    sent = key_of_client(raw_request.headers)
    return bool(expected) and compare_digest(sent.encode(), expected.encode())


def _joined(answers: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [each for answer in answers for each in answer[key]]


def _sessions(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**each, "last_turn": each["last_turn"] and _in_words(each["last_turn"])}
        for each in _joined(answers, "sessions")
    ]


def _turns(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [_in_words(turn) for turn in _joined(answers, "turns")]


def _in_words(turn: dict[str, Any]) -> dict[str, Any]:
    return {**turn, "explanation": explained(turn)}


def _pool(answers: list[dict[str, Any]]) -> dict[str, int] | None:
    """The sums over the pools of all engine cores; None for a client, who may see no pool."""
    pools = [answer["pool"] for answer in answers if "pool" in answer]
    if not pools:
        return None
    return {name: sum(pool[name] for pool in pools) for name in pools[0]}


def _unknown(what: str, name: str) -> JSONResponse:
    return _error(HTTPStatus.NOT_FOUND, f"no {what} {name!r} is remembered")


def _error(status: HTTPStatus, message: str) -> JSONResponse:
    error = ErrorInfo(message=message, type=status.phrase, code=status)
    return JSONResponse(ErrorResponse(error=error).model_dump(), status_code=status)
