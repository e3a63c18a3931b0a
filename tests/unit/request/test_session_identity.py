# SPDX-License-Identifier: Apache-2.0
import base64
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_stateful.request.agent_hint import AgentHint
from vllm_stateful.request.session_identity import (
    MAX_ID_CHARS,
    PLACEHOLDERS,
    TurnIdentity,
    id_fault,
    resolve_turn,
)
from vllm_stateful.types import HintSource

ID = "0d3a9c52-6f1e-4b7a-8a55-2f6d0c9e7b11"
PARENT = "7be1c6f0-1a2b-4c3d-9e8f-5a6b7c8d9e0f"
HINTED = {"session_id": ID, "parent_session_id": PARENT, "lifecycle": "final"}
AGENT_HINT = base64.urlsafe_b64encode(json.dumps(HINTED).encode()).decode().rstrip("=")
OTHER = "c41f7d7e-91aa-4a3e-b0f6-12d4c5e6f708"


def resolve(
    headers: Mapping[str, Any] | None = None,
    body: Mapping[str, object] | None = None,
    tenant_isolation: bool = True,
) -> TurnIdentity:
    fields = body or {}
    return resolve_turn(headers or {}, fields.get, tenant_isolation=tenant_isolation)


def expected(session_id: str | None, source: Any, **rest: Any) -> TurnIdentity:
    ignored = frozenset({HintSource.SESSION_ID}) if "rejected" in rest else frozenset()
    made = {"ignored": ignored, **rest}
    return TurnIdentity(session_id=session_id, source=source, tenant="", **made)


CLIENTS: list[tuple[str, dict[str, str], dict[str, object], TurnIdentity]] = [
    (
        "Claude Code, main agent",
        {"x-claude-code-session-id": ID},
        {"metadata": {"user_id": f"user_ab12_account_{OTHER}_session_{OTHER}"}},
        expected(f"claude-code:{ID}", "claude-code"),
    ),
    (
        "Claude Code, sub-agent with a short id",
        {"x-claude-code-session-id": ID, "x-claude-code-agent-id": "a1b2c3"},
        {},
        expected(f"claude-code:{ID}/a1b2c3", "claude-code", parent_id=f"claude-code:{ID}"),
    ),
    (
        "Claude Code, sub-agent of a sub-agent",
        {
            "x-claude-code-session-id": ID,
            "x-claude-code-agent-id": "a1b2c3",
            "x-claude-code-parent-agent-id": "reviewer",
        },
        {},
        expected(f"claude-code:{ID}/a1b2c3", "claude-code", parent_id=f"claude-code:{ID}/reviewer"),
    ),
    (
        "Claude Code without headers, metadata.user_id",
        {},
        {"metadata": {"user_id": f"user_ab12_account_{OTHER}_session_{ID}"}},
        expected(f"metadata-user-id:{ID}", "metadata-user-id"),
    ),
    (
        "Claude Code without headers, metadata.user_id as JSON",
        {},
        {"metadata": {"user_id": json.dumps({"device_id": "d", "session_id": ID})}},
        expected(f"metadata-user-id:{ID}", "metadata-user-id"),
    ),
    (
        "Codex, root thread",
        {"session-id": ID, "thread-id": ID, "x-client-request-id": OTHER},
        {"prompt_cache_key": ID},
        expected(f"codex:{ID}", "codex"),
    ),
    (
        "Codex, sub-agent thread",
        {"session-id": PARENT, "thread-id": ID, "x-codex-parent-thread-id": PARENT},
        {"prompt_cache_key": PARENT},
        expected(f"codex:{ID}", "codex", parent_id=f"codex:{PARENT}"),
    ),
    (
        "Codex, session only",
        {"session-id": ID},
        {},
        expected(f"codex:{ID}", "codex"),
    ),
    (
        "Codex, compaction",
        {"thread-id": ID, "x-codex-turn-metadata": '{"request_kind":"compaction"}'},
        {},
        expected(f"codex:{ID}", "codex", compaction=True),
    ),
    (
        "Codex, only the shared prompt_cache_key",
        {},
        {"prompt_cache_key": ID},
        expected(f"prompt-cache-key:{ID}", "prompt-cache-key"),
    ),
    (
        "OpenCode, self-hosted",
        {"x-session-id": ID, "x-parent-session-id": PARENT},
        {},
        expected(ID, "x-session-id", parent_id=PARENT),
    ),
    (
        "OpenCode, hosted",
        {"x-opencode-session": ID, "x-parent-session-id": PARENT},
        {},
        expected(f"opencode:{ID}", "opencode", parent_id=f"opencode:{PARENT}"),
    ),
    (
        "DeepSeek harness, compaction of a sub-agent",
        {
            "x-deepseek-harness-session-id": ID,
            "x-deepseek-harness-parent-session-id": PARENT,
            "x-deepseek-harness-compact": "1",
        },
        {},
        expected(
            f"deepseek-harness:{ID}",
            "deepseek-harness",
            parent_id=f"deepseek-harness:{PARENT}",
            compaction=True,
        ),
    ),
    (
        "Dynamo, last turn",
        {
            "x-dynamo-session-id": ID,
            "x-dynamo-parent-session-id": PARENT,
            "x-dynamo-session-final": "true",
        },
        {},
        expected(f"dynamo:{ID}", "dynamo", parent_id=f"dynamo:{PARENT}", final=True),
    ),
    ("vLLM, header", {"x-session-id": ID}, {}, expected(ID, "x-session-id")),
    ("vLLM, body; OpenRouter", {}, {"session_id": ID}, expected(ID, "body")),
    ("vLLM, xargs", {}, {"vllm_xargs": {"session_id": ID}}, expected(ID, "xargs")),
    (
        "Fireworks, LangChain deepagents",
        {"x-multi-turn-session-id": ID},
        {"prompt_cache_key": OTHER},
        expected(f"multi-turn-session:{ID}", "multi-turn-session"),
    ),
    ("LiteLLM", {"x-litellm-session-id": ID}, {}, expected(f"litellm:{ID}", "litellm")),
    (
        "OpenCode, another vendor's server",
        {"x-session-affinity": ID, "x-parent-session-id": PARENT},
        {},
        expected(
            f"x-session-affinity:{ID}",
            "x-session-affinity",
            parent_id=f"x-session-affinity:{PARENT}",
        ),
    ),
    (
        "OpenCode, both of its headers",
        {"x-session-affinity": OTHER, "x-session-id": ID},
        {},
        expected(ID, "x-session-id"),
    ),
    (
        "a gateway's affinity, which names a server",
        {"x-session-affinity": base64.b64encode(b"10.1.2.3:8000").decode()},
        {},
        expected(None, "none", rejected="x-session-affinity: gateway cookie"),
    ),
    (
        "OpenAI Responses, a conversation by its id",
        {},
        {"conversation": ID, "metadata": {"thread_id": OTHER}},
        expected(f"conversation:{ID}", "conversation"),
    ),
    (
        "OpenAI Responses, a conversation as an object",
        {},
        {"conversation": {"id": ID}},
        expected(f"conversation:{ID}", "conversation"),
    ),
    (
        "metadata with a session and a thread",
        {},
        {"metadata": {"session_id": ID, "thread_id": OTHER}},
        expected(f"metadata-session-id:{ID}", "metadata-session-id"),
    ),
    (
        "metadata with a session that is too short",
        {},
        {"metadata": {"session_id": "s-1", "thread_id": ID}},
        expected(
            f"metadata-thread-id:{ID}",
            "metadata-thread-id",
            rejected="metadata-session-id: too short",
        ),
    ),
    (
        "Hermes Agent, a sub-agent's last turn",
        {"x-agent-hint": AGENT_HINT},
        {"prompt_cache_key": OTHER},
        expected(
            f"agent-hint:{ID}",
            "agent-hint",
            parent_id=f"agent-hint:{PARENT}",
            final=True,
            hint=AgentHint(ID, PARENT, is_final=True),
        ),
    ),
    ("a user is no session", {}, {"user": ID}, expected(None, "none")),
    (
        "Aibrix gateway cookie",
        {"x-session-id": base64.b64encode(b"10.1.2.3:8000").decode()},
        {},
        expected(None, "none", rejected="x-session-id: gateway cookie"),
    ),
    (
        "llm-d routing token names a pod",
        {"x-session-token": base64.b64encode(b"ns/pod-0").decode()},
        {},
        expected(None, "none"),
    ),
    ("OpenHands, nothing", {}, {"messages": []}, expected(None, "none")),
]


@pytest.mark.parametrize(
    ("headers", "body", "want"),
    [pytest.param(*row[1:], id=row[0]) for row in CLIENTS],
)
def test_each_client(headers: dict[str, str], body: dict[str, object], want: TurnIdentity) -> None:
    assert resolve(headers, body) == want


def test_precedence_is_the_documented_order() -> None:
    ranked: list[tuple[str, str, str]] = [
        ("field", "session_id", "body"),
        ("header", "x-session-id", "x-session-id"),
        ("field", "vllm_xargs", "xargs"),
        ("header", "x-claude-code-session-id", "claude-code"),
        ("header", "x-agent-hint", "agent-hint"),
        ("header", "thread-id", "codex"),
        ("header", "x-opencode-session", "opencode"),
        ("header", "x-deepseek-harness-session-id", "deepseek-harness"),
        ("header", "x-dynamo-session-id", "dynamo"),
        ("header", "x-multi-turn-session-id", "multi-turn-session"),
        ("header", "x-litellm-session-id", "litellm"),
        ("header", "x-session-affinity", "x-session-affinity"),
        ("field", "prompt_cache_key", "prompt-cache-key"),
        ("metadata", "user_id", "metadata-user-id"),
        ("field", "conversation", "conversation"),
        ("metadata", "session_id", "metadata-session-id"),
        ("metadata", "thread_id", "metadata-thread-id"),
    ]
    nested: dict[str, object] = {"vllm_xargs": {"session_id": ID}, "user_id": f"u_session_{ID}"}
    nested["x-agent-hint"] = json.dumps({"session_id": ID})
    for first in range(len(ranked)):
        present = ranked[first:]
        headers, body, metadata = (
            {name: nested.get(name, ID) for kind, name, _ in present if kind == wanted}
            for wanted in ("header", "field", "metadata")
        )
        assert resolve(headers, {**body, "metadata": metadata}).source == present[0][2]


def test_an_unusable_id_gives_way_to_the_next_source_and_is_remembered() -> None:
    identity = resolve({"x-session-id": "default", "thread-id": ID}, {"session_id": 7})
    assert identity.session_id == f"codex:{ID}"
    assert identity.rejected == "body: not a string; x-session-id: placeholder"


def test_thread_id_gives_way_to_session_id() -> None:
    assert resolve({"thread-id": "t1", "session-id": ID}).session_id == f"codex:{ID}"


def test_empty_values_count_as_absent() -> None:
    identity = resolve({"x-session-id": ""}, {"session_id": "", "metadata": {"user_id": ""}})
    assert identity == expected(None, "none")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (ID, None),
        ("customer 4711 / ticket 9", None),
        ("séance-du-matin", None),
        ("short", "too short"),
        ("x" + "y" * MAX_ID_CHARS, "too long"),
        ("two\nlines-of-text", "control characters"),
        ("nul\x00in-the-middle", "control characters"),
        ("surrogate-\ud800-here", "control characters"),
        ("00000000-0000-0000-0000-000000000000", "placeholder"),
        ("xxxxxxxxxxxx", "placeholder"),
        ("        ", "placeholder"),
        ("Test_Session", "placeholder"),
        ("<your session id>", "placeholder"),
        ("${SESSION_ID}", "placeholder"),
        ("[object Object]", "placeholder"),
        (b"0d3a9c52-6f1e", "not a string"),
        (12345678901, "not a string"),
    ],
)
def test_id_fault(value: object, fault: str | None) -> None:
    assert id_fault(value) == fault


@pytest.mark.parametrize("value", sorted(PLACEHOLDERS))
def test_no_placeholder_identifies_a_session(value: str) -> None:
    assert resolve({}, {"session_id": value.upper()}).session_id is None


@pytest.mark.parametrize("address", [b"10.1.2.3:8000", b"[fd00::1]:8000"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("padding", ["", "="])
def test_gateway_cookies_are_not_sessions(address: bytes, encode: Any, padding: str) -> None:
    cookie = encode(address).decode().rstrip("=") + padding * (-len(address) % 3)
    assert resolve({"x-session-id": cookie}).session_id is None
    assert resolve({}, {"session_id": cookie}).session_id == cookie


def test_a_user_id_that_names_a_user_is_ignored() -> None:
    for user_id in ("user-4711-of-acme", '{"account_uuid": "x"}', "{broken", 12):
        identity = resolve({}, {"metadata": {"user_id": user_id}})
        assert identity == expected(None, "none")


def test_final_releases_only_the_session_it_names() -> None:
    final = {"x-dynamo-session-final": "True"}
    assert resolve(final).final
    assert resolve({**final, "x-session-id": ID}).final
    assert resolve({**final, "x-session-id": ID, "x-dynamo-session-id": ID}).final
    assert not resolve({**final, "x-session-id": ID, "x-dynamo-session-id": OTHER}).final
    assert not resolve({"x-dynamo-session-final": "false", "x-dynamo-session-id": ID}).final


def test_a_hint_releases_only_the_session_that_it_names() -> None:
    def final(**said: Any) -> bool:
        hint = {"lifecycle": "final", **said}
        return resolve({"x-agent-hint": json.dumps(hint), "x-session-id": ID}).final

    assert final()
    assert final(session_id=ID)
    assert not final(session_id=OTHER)
    assert not final(lifecycle="idle")


def test_headers_that_cannot_be_read_are_told_by_their_source() -> None:
    unreadable = {
        "x-agent-hint": ("{", HintSource.AGENT_HINT),
        "x-session-id": ("abc", HintSource.SESSION_ID),
        "x-dynamo-session-final": ("perhaps", HintSource.SESSION_FINAL),
        "x-codex-turn-metadata": ("[]", HintSource.COMPACTION),
        "x-deepseek-harness-compact": ("7", HintSource.COMPACTION),
        "x-stainless-retry-count": ("-1", HintSource.RETRY),
        "x-codex-window-id": ("seven", HintSource.WINDOW),
    }
    for name, (value, source) in unreadable.items():
        assert resolve({name: value}).ignored == {source}, name
        assert resolve({name: ""}).ignored == frozenset(), name
    together = resolve({name: value for name, (value, _) in unreadable.items()})
    assert together.ignored == {source for _, source in unreadable.values()}


def test_compaction_does_not_depend_on_where_the_id_was_found() -> None:
    metadata = json.dumps({"request_kind": "compaction"})
    assert resolve({"x-codex-turn-metadata": metadata}, {"session_id": ID}).compaction
    for harmless in ("[]", "{", "[" * 8000, '{"request_kind": "turn"}', "1" * 9000):
        assert not resolve({"x-codex-turn-metadata": harmless, "thread-id": ID}).compaction


def test_children_of_different_roots_never_share_an_id() -> None:
    def claude(root: str, agent: str) -> str | None:
        headers = {"x-claude-code-session-id": root, "x-claude-code-agent-id": agent}
        return resolve(headers).session_id

    ids = [
        claude("root-one/x", "agent"),
        claude("root-one", "x/agent"),
        claude("root-one/x/agent", ""),
        claude("root-one%2Fx", "agent"),
        claude("root-one", ""),
    ]
    assert None not in ids
    assert len(set(ids)) == len(ids)


def test_a_parent_that_is_itself_or_unusable_is_dropped() -> None:
    assert resolve({"thread-id": ID, "x-codex-parent-thread-id": ID}).parent_id is None
    assert resolve({"x-session-id": ID, "x-parent-session-id": "null"}).parent_id is None


TEXT = st.one_of(
    st.text(),
    st.text(st.characters(categories=["Cs", "Cc"])),
    st.just("x" * 100_000),
    st.just("[" * 5000),
    st.just('{"session_id": ' * 500),
    st.sampled_from([ID, "default", "MTAuMS4yLjM6ODAwMA==", "true", "1"]),
)
JSON_VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.binary()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["session_id", "user_id", "thread_id", "id"]), inner, max_size=2
        ),
    ),
    max_leaves=5,
)
HEADER_NAMES = [
    "authorization",
    "x-api-key",
    "x-session-id",
    "x-session-affinity",
    "x-parent-session-id",
    "x-claude-code-session-id",
    "x-claude-code-agent-id",
    "x-claude-code-parent-agent-id",
    "thread-id",
    "session-id",
    "x-codex-parent-thread-id",
    "x-codex-turn-metadata",
    "x-deepseek-harness-compact",
    "x-dynamo-session-id",
    "x-dynamo-session-final",
    "x-agent-hint",
    "x-stainless-retry-count",
    "x-codex-window-id",
]
FIELD_NAMES = ["session_id", "vllm_xargs", "prompt_cache_key", "metadata", "conversation"]


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(HEADER_NAMES), st.one_of(TEXT, JSON_VALUE), max_size=6),
    st.dictionaries(st.sampled_from(FIELD_NAMES), JSON_VALUE, max_size=4),
)
def test_no_client_input_raises(headers: dict[str, Any], body: dict[str, object]) -> None:
    identity = resolve(headers, body)
    assert (identity.session_id is None) == (identity.source == "none")
    if identity.session_id is not None:
        assert 8 <= len(identity.session_id) <= MAX_ID_CHARS + 32
        identity.session_id.encode()
