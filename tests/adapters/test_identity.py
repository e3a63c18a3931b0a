# SPDX-License-Identifier: Apache-2.0
"""Session and tenant on their way from the HTTP request to the engine."""

import asyncio
import base64
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_stateful.adapters.engine.turn import (
    forced_tool,
    is_final,
    retention_wish,
    take_said,
)
from vllm_stateful.adapters.frontend import identity
from vllm_stateful.adapters.frontend.identity import (
    TenantMiddleware,
    identify,
    salt_of,
    stamp,
)
from vllm_stateful.adapters.slots import of_request
from vllm_stateful.request import ResponseChain
from vllm_stateful.session import Said
from vllm_stateful.transport.wire import (
    CLOSE_ACTION,
    RETAIN_ACTION,
    TURN_ACTION,
)
from vllm_stateful.types import SALT_PREFIX

SESSION = "0d3a9c52-6f1e-4b7a-8a55-2f6d0c9e7b11"
ALICE = {"authorization": "Bearer key-of-alice"}
BOB = {"authorization": "Bearer key-of-bob"}
FINAL = {"x-dynamo-session-id": SESSION, "x-dynamo-session-final": "true"}


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("VLLM_STATEFUL")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(identity, "_responses", ResponseChain())


def http(headers: dict[str, str], sent: Any = None) -> SimpleNamespace:
    """An HTTP request; `sent` is the body as starlette keeps it."""
    return SimpleNamespace(headers=headers, state=SimpleNamespace(), _json=sent)


def body(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**fields)


def engine_request(
    session_id: str | None = None, salt: str | None = None, **params: Any
) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="request-1",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(**params),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=salt,
        data_parallel_rank=None,
        session_id=session_id,
    )


def sent(
    headers: dict[str, str],
    salt: str | None = None,
    stock: str | None = None,
    **fields: Any,
) -> EngineCoreRequest:
    """The request that the engine gets for an HTTP request."""
    return stamp(engine_request(identify(body(**fields), http(headers), stock), salt))


# ---- a prompt that is only prepared -------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "num_tokens"),
    [({"prewarm": True}, 1), ({"prewarm": False}, 9), ({"prewarm": "yes"}, 9), ([], 9), (None, 9)],
)
def test_a_prompt_that_is_only_prepared_gets_one_token(options: object, num_tokens: int) -> None:
    sent_body = {"messages": [], "prompt_cache_options": options}
    request = engine_request(identify(body(), http({}, sent_body), None))
    assert request.sampling_params is not None
    request.sampling_params.max_tokens, request.sampling_params.min_tokens = 9, 5
    stamp(request)
    assert request.sampling_params.max_tokens == num_tokens
    assert request.sampling_params.min_tokens == (0 if num_tokens == 1 else 5)


# ---- tenants ---------------------------------------------------------------------------------


def test_one_session_id_under_two_api_keys_gets_two_salts() -> None:
    named = {"x-session-id": SESSION}
    alice, bob = (sent({**key, **named}, stock=SESSION) for key in (ALICE, BOB))
    assert alice.session_id == bob.session_id == SESSION
    assert alice.cache_salt != bob.cache_salt
    for request in (alice, bob):
        assert str(request.cache_salt).startswith(SALT_PREFIX)
        assert "key-of" not in str(request.cache_salt)


def test_the_same_key_gets_the_same_salt_and_the_clients_salt_still_counts() -> None:
    assert sent(ALICE).cache_salt == sent(ALICE).cache_salt
    assert sent(ALICE).cache_salt != sent(ALICE, salt="more").cache_salt
    assert sent(ALICE, salt="a").cache_salt != sent(ALICE, salt="b").cache_salt


@pytest.mark.parametrize("salt", [None, "", "salt-of-client"])
def test_without_a_key_the_salt_stays_as_it_is(salt: str | None) -> None:
    assert sent({}, salt=salt).cache_salt == salt


def test_a_client_cannot_claim_the_salt_of_a_tenant() -> None:
    stolen = sent(ALICE).cache_salt
    assert sent({}, salt=stolen).cache_salt != stolen
    assert sent(BOB, salt=stolen).cache_salt != stolen


def test_with_tenant_cache_salt_the_api_key_does_not_separate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_TENANT", "cache-salt")
    assert sent(ALICE, salt="shared").cache_salt == sent(BOB, salt="shared").cache_salt == "shared"
    assert sent(ALICE).cache_salt is None


@pytest.mark.parametrize("headers", [{}, ALICE])
@pytest.mark.parametrize("salt", [None, "salt-of-client"])
def test_the_route_that_closes_a_session_uses_the_salt_of_its_turns(
    headers: dict[str, str], salt: str | None
) -> None:
    assert salt_of(headers, salt) == sent(headers, salt=salt).cache_salt


def through_middleware(headers: dict[str, str], kind: str = "http") -> EngineCoreRequest:
    """A request on a route that never asks for a session id."""
    made: list[EngineCoreRequest] = []

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        made.append(await in_a_task(lambda: stamp(engine_request())))

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "headers": raw}
    asyncio.run(TenantMiddleware(handler)(scope, None, None))
    return made[0]


def test_routes_that_ask_for_no_session_separate_tenants_all_the_same() -> None:
    alice, bob = (through_middleware(key).cache_salt for key in (ALICE, BOB))
    assert alice == sent(ALICE).cache_salt
    assert bob == sent(BOB).cache_salt
    assert through_middleware({}).cache_salt is None


def test_a_websocket_belongs_to_its_tenant() -> None:
    alice, bob = (through_middleware(key, kind="websocket") for key in (ALICE, BOB))
    assert alice.cache_salt == sent(ALICE).cache_salt
    assert bob.cache_salt == sent(BOB).cache_salt


def test_the_middleware_leaves_what_is_no_http_request_alone() -> None:
    assert through_middleware(ALICE, kind="lifespan").cache_salt is None


def test_the_middleware_is_off_with_tenant_cache_salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_TENANT", "cache-salt")
    assert through_middleware(ALICE).cache_salt is None


# ---- session ids -----------------------------------------------------------------------------


def test_an_id_that_vllm_found_is_passed_on_as_it_is() -> None:
    assert sent({"x-session-id": SESSION}, stock=SESSION).session_id == SESSION
    assert sent({}, stock=SESSION, session_id=SESSION).session_id == SESSION


def test_an_id_under_a_name_that_vllm_does_not_read_names_its_source() -> None:
    assert sent({"x-claude-code-session-id": SESSION}).session_id == f"claude-code:{SESSION}"
    assert sent({}, prompt_cache_key=SESSION).session_id == f"prompt-cache-key:{SESSION}"


def test_the_identity_reaches_the_engines_request_in_another_task() -> None:
    """vLLM identifies a streamed request in one task and sends it to the engine in another."""
    found = asyncio.run(in_a_task(lambda: identify(body(), http({**ALICE, **FINAL}), None)))
    request = asyncio.run(in_a_task(lambda: stamp(engine_request(found))))
    assert request.cache_salt == sent(ALICE).cache_salt is not None
    assert request.kv_hints is not None


async def in_a_task(function: Callable[[], Any]) -> Any:
    async def call() -> Any:
        return function()

    return await asyncio.create_task(call())


def test_what_is_sent_to_the_engine_is_a_plain_string() -> None:
    assert type(sent(ALICE, stock=SESSION, session_id=SESSION).session_id) is str


def test_without_any_id_there_is_none() -> None:
    assert sent({}).session_id is None
    assert not identify(body(), None, None)


@pytest.mark.parametrize("short", ["abc", "default", "1234567"])
def test_an_unusable_id_keeps_what_stock_vllm_would_send(short: str) -> None:
    assert identify(body(session_id=short), http({}), short) == short
    assert identify(body(), http({"x-session-id": short}), short) == short


@pytest.mark.parametrize("server", ["10.0.0.1:8000", "[fe80::1]:8000"])
def test_a_gateways_cookie_is_dropped(server: str) -> None:
    cookie = base64.b64encode(server.encode()).decode()
    assert sent({"x-session-id": cookie}, stock=cookie).session_id is None


def test_a_gateways_cookie_does_not_hide_the_agents_own_id() -> None:
    cookie = base64.b64encode(b"10.0.0.1:8000").decode()
    headers = {"x-session-id": cookie, "x-claude-code-session-id": SESSION}
    assert identify(body(), http(headers), cookie) == f"claude-code:{SESSION}"


def test_offline_the_session_comes_from_the_sampling_parameters() -> None:
    request = stamp(engine_request(extra_args={"session_id": SESSION}))
    assert (request.session_id, request.cache_salt) == (SESSION, None)


@pytest.mark.parametrize("extra", [None, {}, {"session_id": ""}, {"session_id": 7}])
def test_offline_without_a_usable_id_there_is_no_session(extra: dict[str, Any] | None) -> None:
    assert stamp(engine_request(extra_args=extra)).session_id is None


def test_an_id_from_http_wins_over_the_sampling_parameters() -> None:
    request = stamp(engine_request(SESSION, extra_args={"session_id": "session-other"}))
    assert request.session_id == SESSION


# ---- where the engine keeps no sessions ------------------------------------------------------


@pytest.fixture
def _engine_off() -> Iterator[None]:
    identity.stand_aside("an unsupported model")
    yield
    identity.stand_aside(None)


@pytest.mark.usefixtures("_engine_off")
@pytest.mark.parametrize("stock", [None, SESSION])
def test_requests_reach_an_engine_without_sessions_as_they_came(stock: str | None) -> None:
    headers = {"authorization": "Bearer one", "x-claude-code-session-id": "session-of-mine"}
    request = sent({**headers, **FINAL}, stock=stock)
    assert (request.session_id, request.cache_salt, request.kv_hints) == (stock, None, None)


@pytest.mark.usefixtures("_engine_off")
def test_kept_answers_belong_to_a_tenant_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_RESPONSE_CACHE_BYTES", "1M")
    salts = {sent({"authorization": f"Bearer {key}"}).cache_salt for key in ("one", "two")}
    assert len(salts) == 2
    assert None not in salts


# ---- end of a session ------------------------------------------------------------------------


def test_the_last_turn_carries_a_hint_that_the_engine_understands() -> None:
    request = sent(FINAL)
    assert request.session_id == f"dynamo:{SESSION}"
    assert request.kv_hints is not None
    assert hints_of(request) == [CLOSE_ACTION, TURN_ACTION]
    assert is_final(request)  # type: ignore[arg-type]


def hints_of(request: Any) -> list[str]:
    return [action.action_type for action in request.kv_hints.actions]


def test_other_turns_carry_no_such_hint() -> None:
    assert hints_of(sent({"x-dynamo-session-id": SESSION})) == [TURN_ACTION]
    assert hints_of(sent({**FINAL, "x-dynamo-session-final": "false"})) == [TURN_ACTION]
    assert sent({}).kv_hints is None


def test_what_a_client_says_of_its_turn_reaches_the_record() -> None:
    parent = "11111111-2222-3333-4444-555555555555"
    headers = {
        "thread-id": SESSION,
        "x-codex-parent-thread-id": parent,
        "x-codex-turn-metadata": '{"request_kind": "compaction"}',
        "x-codex-window-id": f"{SESSION}:3",
        "x-stainless-retry-count": "2",
    }
    said = told(sent(headers, prompt_cache_key="default"))
    assert said == Said("codex", f"codex:{parent}", compaction=True, retry=2, window=3)
    rejected = told(sent({"x-session-id": "abc"}))
    assert rejected == Said(rejected="x-session-id: too short")


def told(request: Any) -> Said:
    """What the engine reads, and takes out of what connectors may read."""
    engine = SimpleNamespace(kv_hints=request.kv_hints)
    take_said(engine)  # type: ignore[arg-type]
    assert engine.kv_hints is None
    return of_request(engine).said


def test_other_hints_stay_where_they_are() -> None:
    engine: Any = SimpleNamespace(kv_hints=sent(FINAL).kv_hints)
    take_said(engine)
    assert hints_of(engine) == [CLOSE_ACTION]
    assert of_request(engine).said.source == "dynamo"


@pytest.mark.parametrize("wrong", [[], {}, 7, True, None])
def test_what_has_another_type_is_not_said(wrong: Any) -> None:
    assert Said.of({"parent": wrong, "source": wrong, "rejected": wrong}) == Said()
    assert Said.of({"retry": "2", "window": True, "compaction": 1, "unknown": 1}) == Said()


@pytest.mark.parametrize("count", ["", "-1", "1e9", "9999", "two"])
def test_a_count_that_is_none_says_nothing(count: str) -> None:
    request = sent({"x-stainless-retry-count": count, "x-codex-window-id": count})
    assert request.kv_hints is None


def test_with_explain_off_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_EXPLAIN", "off")
    assert sent({"x-dynamo-session-id": SESSION}).kv_hints is None


def test_hints_of_somebody_else_are_kept() -> None:
    theirs = object()
    request = engine_request(identify(body(), http(FINAL), None))
    request.kv_hints = theirs  # type: ignore[assignment]
    assert stamp(request).kv_hints is theirs


def test_one_requests_identity_does_not_reach_the_next() -> None:
    sent({**ALICE, **FINAL})
    request = sent({})
    assert (request.cache_salt, request.kv_hints) == (None, None)


# ---- the Responses API -----------------------------------------------------------------------


def respond(headers: dict[str, str], response_id: str, previous: str | None = None) -> str:
    return identify(
        body(previous_response_id=previous, request_id=response_id, store=True),
        http(headers),
        None,
    )


def test_a_chain_of_responses_is_one_session() -> None:
    first = respond({}, "resp_1")
    assert first == "previous-response-id:resp_1"
    assert respond({}, "resp_2", previous="resp_1") == first
    assert respond({}, "resp_3", previous="resp_2") == first
    assert respond({}, "resp_4") == "previous-response-id:resp_4"


def test_a_chain_that_the_client_named_keeps_its_name() -> None:
    assert respond({"x-session-id": SESSION}, "resp_1") == SESSION
    assert respond({}, "resp_2", previous="resp_1") == SESSION


def test_a_response_of_another_tenant_is_not_followed() -> None:
    assert respond({**ALICE, "x-session-id": SESSION}, "resp_1") == SESSION
    assert respond(BOB, "resp_2", previous="resp_1") == "previous-response-id:resp_1"


def test_a_response_that_is_not_stored_starts_no_chain() -> None:
    request = body(previous_response_id=None, request_id="resp_1", store=False)
    assert not identify(request, http({}), None)


# ---- Anthropic -------------------------------------------------------------------------------


def test_metadata_that_vllm_drops_is_read_from_the_body() -> None:
    sent_by_client = {"metadata": {"user_id": f"user_ab12_account_x_session_{SESSION}"}}
    found = identify(body(), http({}, sent_by_client), None)
    assert found == f"metadata-user-id:{SESSION}"


def test_what_vllm_parsed_wins_over_the_body() -> None:
    found = identify(body(session_id=SESSION), http({}, {"session_id": "session-other"}), SESSION)
    assert found == SESSION


@pytest.mark.parametrize("sent_by_client", [None, [], "text", 7, {"metadata": None}])
def test_a_body_without_metadata_names_nothing(sent_by_client: Any) -> None:
    assert not identify(body(), http({}, sent_by_client), None)


# ---- a tool that must be called --------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "tool"),
    [
        (SimpleNamespace(type="function", function=SimpleNamespace(name="look_up")), "look_up"),
        (SimpleNamespace(type="function", name="look_up"), "look_up"),  # the Responses API
        (SimpleNamespace(type="function", name="x" * (identity.MAX_TOOL_CHARS + 1)), None),
        ("required", None),
        (None, None),
    ],
)
def test_the_tool_that_a_request_names_reaches_the_engine(choice: Any, tool: str | None) -> None:
    request: Any = over_the_wire(sent({}, tool_choice=choice))
    assert forced_tool(request) == tool


# ---- wishes ----------------------------------------------------------------------------------

DAY = {"prompt_cache_retention": "24h"}


def wished(headers: dict[str, str], sent_by_client: Any) -> EngineCoreRequest:
    return stamp(engine_request(identify(body(), http(headers, sent_by_client), None)))


def test_a_wish_reaches_the_engine_as_a_hint() -> None:
    request = wished({}, DAY)
    assert request.kv_hints is not None
    assert [action.action_type for action in request.kv_hints.actions] == [RETAIN_ACTION]
    assert retention_wish(over_the_wire(request)) == 86_400


def test_a_last_turn_may_carry_a_wish_too() -> None:
    request = over_the_wire(wished(FINAL, DAY))
    assert [action.action_id for action in request.kv_hints.actions] == ["0", "1", "2"]
    assert is_final(request)
    assert retention_wish(request) == 86_400


@pytest.mark.parametrize("sent_by_client", [None, {}, [DAY], {"prompt_cache_retention": "2h"}])
def test_without_a_readable_wish_there_is_no_hint(sent_by_client: Any) -> None:
    request = wished({}, sent_by_client)
    assert request.kv_hints is None
    assert retention_wish(over_the_wire(request)) is None


def test_the_hints_of_the_clients_own_process_win() -> None:
    request = engine_request(identify(body(), http({}, DAY), None))
    request.kv_hints = theirs = hints({"seconds": 5})
    assert stamp(request).kv_hints is theirs
    assert retention_wish(over_the_wire(request)) == 5


@pytest.mark.parametrize(
    ("payloads", "seconds"),
    [
        ([], None),
        ([{}], None),
        ([{"seconds": 0}], None),
        ([{"seconds": 60}, {"seconds": "x"}, {"seconds": 90.5}], 90.5),
        ([{"seconds": 1e9}], 86_400),
    ],
)
def test_the_longest_readable_hint_counts(payloads: list[Any], seconds: float | None) -> None:
    request = engine_request()
    request.kv_hints = hints(*payloads)
    assert retention_wish(over_the_wire(request)) == seconds
    assert not is_final(over_the_wire(request))


def hints(*payloads: dict[str, Any]) -> KvHintsEnvelope:
    actions = [KvHintAction("a", RETAIN_ACTION, "1", payload) for payload in payloads]
    return KvHintsEnvelope("p", "m", [*actions, KvHintAction("b", "other", "1", {"seconds": 7})])


def over_the_wire(request: EngineCoreRequest) -> Any:
    """The request as the engine core gets it."""
    return MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(request))
