# SPDX-License-Identifier: Apache-2.0
"""Finds the session and the tenant that a turn belongs to.

A session id is a hint: it says where to look for reusable work first. It never authorizes anything:
blocks are reused only after token ids and the tenant's salt were compared. So a wrong id only costs
time. A missing id is not an error: the session is then derived from content.

Sources, first usable one wins (each row is `source` in `TurnIdentity`):

    body                body `session_id`                            read by vLLM itself
    x-session-id        header X-Session-ID (+ X-Parent-Session-ID)  read by vLLM itself
    xargs               body `vllm_xargs.session_id`                 read by vLLM itself
    claude-code         x-claude-code-session-id, -agent-id, -parent-agent-id
    agent-hint          x-agent-hint, see `agent_hint`               Hermes Agent
    codex               thread-id, else session-id; x-codex-parent-thread-id
    opencode            x-opencode-session (+ x-parent-session-id)
    deepseek-harness    x-deepseek-harness-session-id, -parent-session-id
    dynamo              x-dynamo-session-id, -parent-session-id
    multi-turn-session  x-multi-turn-session-id                      Fireworks, LangChain
    litellm             x-litellm-session-id
    x-session-affinity  x-session-affinity (+ x-parent-session-id)   OpenCode, Fireworks
    prompt-cache-key    body `prompt_cache_key`
    metadata-user-id    body `metadata.user_id`, only if it contains a session (Claude Code)
    conversation        body `conversation`, a string or `{"id": ...}`  OpenAI Responses
    metadata-session-id body `metadata.session_id`
    metadata-thread-id  body `metadata.thread_id`

`user` names no session, as one user has many. The first three keep the order of vLLM 0.32
`GenerateBaseServing._get_session_id`.
`previous-response-id` is resolved by `response_chain.ResponseChain`, which keeps state.
"""

import base64
import binascii
import hashlib
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from vllm_stateful.request.agent_hint import NO_HINT, AgentHint, agent_hint
from vllm_stateful.request.client_signs import (
    MAX_JSON_CHARS,
    Signs,
    has_control_characters,
    json_object,
    signs_of,
)
from vllm_stateful.types import SALT_PREFIX, TENANT_HEX_CHARS, HintSource

Source = Literal[
    "body",
    "x-session-id",
    "xargs",
    "claude-code",
    "agent-hint",
    "codex",
    "opencode",
    "deepseek-harness",
    "dynamo",
    "multi-turn-session",
    "litellm",
    "x-session-affinity",
    "prompt-cache-key",
    "previous-response-id",
    "metadata-user-id",
    "conversation",
    "metadata-session-id",
    "metadata-thread-id",
    "none",
]
_UNPREFIXED: frozenset[Source] = frozenset({"body", "x-session-id", "xargs", "none"})
FieldReader = Callable[[str], object]

GATEWAY_COOKIE = "gateway cookie"
"""Why an X-Session-ID that names a server is unusable."""

MIN_ID_CHARS = 8
MAX_ID_CHARS = 256

# Ids from these sources are sent to the engine unchanged, as stock vLLM does, so KV events keep
# their meaning. Ids from all other sources are sent as "<source>:<id>".
_SOURCES_READ_BY_VLLM: frozenset[str] = frozenset({"body", "x-session-id", "xargs"})

# Values that software sends when nobody has filled in a real id. They are compared after case
# folding, with "_" and " " read as "-" and with surrounding brackets, quotes, "$" and "%" removed.
# An id made of one repeated character ("00000000-0000-...", "xxxxxxxx") is a placeholder, too.
# fmt: off
PLACEHOLDERS: frozenset[str] = frozenset({
    "default", "default-session", "default-session-id", "global", "anonymous", "unknown",
    "undefined", "none", "null", "nil", "empty", "no-session", "object-object", "string", "uuid",
    "placeholder", "changeme", "session", "session-id", "sessionid", "conversation",
    "conversation-id", "thread-id", "prompt-cache-key", "my-session", "my-session-id",
    "new-session", "your-session", "your-session-id", "your-thread-id", "test", "testing",
    "test-session", "test-session-id", "example", "example-session", "demo-session", "dummy",
    "dummy-session", "12345678", "123456789", "1234567890", "0123456789",
    "123e4567-e89b-12d3-a456-426614174000", "550e8400-e29b-41d4-a716-446655440000",
})
# fmt: on

# source, header with the session id, header with the parent's id
_AGENT_HEADERS: tuple[tuple[Source, str, str | None], ...] = (
    ("codex", "thread-id", "x-codex-parent-thread-id"),
    ("codex", "session-id", "x-codex-parent-thread-id"),
    ("opencode", "x-opencode-session", "x-parent-session-id"),
    (
        "deepseek-harness",
        "x-deepseek-harness-session-id",
        "x-deepseek-harness-parent-session-id",
    ),
    ("dynamo", "x-dynamo-session-id", "x-dynamo-parent-session-id"),
    ("multi-turn-session", "x-multi-turn-session-id", None),
    ("litellm", "x-litellm-session-id", None),
    ("x-session-affinity", "x-session-affinity", "x-parent-session-id"),
)
_MAY_NAME_A_SERVER: frozenset[Source] = frozenset({"x-session-id", "x-session-affinity"})

_TENANT = re.compile(rf"[0-9a-f]{{{TENANT_HEX_CHARS}}}")

_USER_ID_SESSION = re.compile(r"_session_([0-9a-fA-F-]{8,64})\Z")


@dataclass(frozen=True, slots=True)
class TurnIdentity:
    """The session and the tenant of a turn.

    session_id: the id that the engine gets; None means "derive the session from content".
    source: where the id was found; "none" without an id.
    tenant: `tenant_of` the request; "" when it had no key or isolation is off.
    parent_id: session id of the agent that started this one, in the same form as `session_id`.
    final: whether the client said that this is the session's last turn.
    compaction: whether the client said that this turn summarizes its own history.
    rejected: why ids that were present are unusable, as "source: reason" joined by "; ". Never
        contains what the client sent.
    retry: how often the client's library had sent the same request before; 0 for the first time.
    window: the number of the context window, where the client counts them (Codex); it grows by one
        with each compaction.
    hint: what its `X-Agent-Hint` says beside that.
    ignored: the hints that could not be read.
    """

    session_id: str | None
    source: Source
    tenant: str
    parent_id: str | None = None
    final: bool = False
    compaction: bool = False
    rejected: str | None = None
    retry: int = 0
    window: int | None = None
    hint: AgentHint = NO_HINT
    ignored: frozenset[HintSource] = frozenset()


@dataclass(frozen=True, slots=True)
class _Claim:
    """One place where the client may have named its session.

    value: the id that must be usable.
    child: a longer id built from `value`, which then is the session's id.
    """

    source: Source
    value: object
    parent: object = None
    child: str | None = None


def resolve_turn(
    headers: Mapping[str, str], field: FieldReader, *, tenant_isolation: bool = True
) -> TurnIdentity:
    """Find the session that a request names.

    headers: looked up by lower-case names with `.get` (starlette's Headers, or a dict with
        lower-case keys).
    field: returns a field of the request body, or None if the body has no such field.
    tenant_isolation: False puts every client in the tenant "".

    Raises nothing for any header or body value.
    """
    tenant = tenant_of(headers) if tenant_isolation else ""
    signs, hint = signs_of(headers), agent_hint(headers)
    named, reasons = _named(_claims(headers, field, hint))
    raw_id = None if named is None else str(named.value)
    ignored = set(signs.ignored)
    if reasons:
        ignored.add(HintSource.SESSION_ID)
    if hint.is_ignored:
        ignored.add(HintSource.AGENT_HINT)
    return TurnIdentity(
        session_id=None if named is None else _engine_id(named.source, named.child or str(raw_id)),
        source="none" if named is None else named.source,
        tenant=tenant,
        parent_id=None if named is None else _parent_id(named),
        final=_is_final(headers, signs, hint, raw_id),
        compaction=signs.compaction,
        rejected="; ".join(reasons) or None,
        retry=signs.retry,
        window=signs.window,
        hint=hint,
        ignored=frozenset(ignored),
    )


def _named(claims: Iterator[_Claim]) -> tuple[_Claim | None, list[str]]:
    """The first claim that names a session, and why those before it do not."""
    reasons: list[str] = []
    for claim in claims:
        if claim.value is None or claim.value == "":
            continue
        reason = _claim_fault(claim)
        if reason is None:
            return claim, reasons
        reasons.append(f"{claim.source}: {reason}")
    return None, reasons


def id_as_sent(identity: TurnIdentity) -> str | None:
    """The id as the client sent it; None when the client named no session.

    A session that a previous response names is not named by the client. A sub-agent of Claude Code
    is "root/agent". `ids_of_client` of the result has the engine's id in it.
    """
    if identity.session_id is None or identity.source == "previous-response-id":
        return None
    if identity.source in _SOURCES_READ_BY_VLLM:
        return identity.session_id
    return identity.session_id.removeprefix(f"{identity.source}:")


def ids_of_client(raw_id: str) -> list[str]:
    """All ids under which the engine may know a session that its client names `raw_id`.

    A client that asks to close a session gives the id that it sent, but not the header in which it
    sent it.
    """
    own: list[Source] = [source for source in get_args(Source) if source not in _UNPREFIXED]
    return [raw_id, *(_engine_id(source, raw_id) for source in own)]


def id_fault(value: object) -> str | None:
    """Why `value` cannot identify a session; None when it can.

    An id must be a string of 8 to 256 characters without control characters, line separators or
    lone surrogates, and must not be a placeholder (see `PLACEHOLDERS`).
    """
    if not isinstance(value, str):
        return "not a string"
    if len(value) > MAX_ID_CHARS:
        return "too long"
    if has_control_characters(value):
        return "control characters"
    if _is_placeholder(value):
        return "placeholder"
    if len(value) < MIN_ID_CHARS:
        return "too short"
    return None


def tenant_of(headers: Mapping[str, str]) -> str:
    """The name of the tenant that sent a request: 16 hex characters of a SHA-256, or "".

    The API key is read from `Authorization: Bearer`, then `x-api-key`, then `api-key`. vLLM checks
    only the first of these, so it comes first. The key itself is never returned or kept.
    """
    key = key_of_client(headers)
    if not key:
        return ""
    return _sha256_hex(b"tenant:" + _to_bytes(key))[:TENANT_HEX_CHARS]


def scoped_salt(tenant: str, cache_salt: str | None) -> str | None:
    """The cache salt that keeps one tenant's blocks apart from another's.

    Without a tenant the salt is returned unchanged, so block hashes stay those of stock vLLM.
    Otherwise the result is `SALT_PREFIX`, 16 hex characters that stand for the tenant (see
    `types.tenant_of_salt`), "." and 64 hex characters of a SHA-256 over tenant and salt. No two
    different pairs give the same salt. The result fits `validate_cache_salt` of vLLM 0.32 (at most
    128 characters; no "@", "/", "\\" or NUL).

    A client's own salt that starts with `SALT_PREFIX` is hashed even without a tenant, and the
    result then names no tenant. Otherwise a client could choose another tenant's salt, or be
    counted as another tenant.
    """
    salt = cache_salt if isinstance(cache_salt, str) else None
    is_reserved = salt is not None and salt.startswith(SALT_PREFIX)
    if not tenant and not is_reserved:
        return salt
    tenant_bytes = _to_bytes(tenant)
    parts = [b"salt:", str(len(tenant_bytes)).encode(), b":", tenant_bytes]
    if salt is not None:
        parts += [b":", _to_bytes(salt)]
    return f"{SALT_PREFIX}{_tenant_hex(tenant)}.{_sha256_hex(b''.join(parts))}"


def _tenant_hex(tenant: str) -> str:
    """A tenant's name as used in a salt. A text that is not such a name is hashed."""
    if not tenant or _TENANT.fullmatch(tenant):
        return tenant
    return _sha256_hex(b"tenant-in-salt:" + _to_bytes(tenant))[:TENANT_HEX_CHARS]


def _claims(headers: Mapping[str, str], field: FieldReader, hint: AgentHint) -> Iterator[_Claim]:
    """Yield every place that may name a session, best first. Later ones are read only if needed."""
    yield _Claim("body", field("session_id"))
    yield _Claim("x-session-id", headers.get("x-session-id"), headers.get("x-parent-session-id"))
    yield _Claim("xargs", _entry(field("vllm_xargs"), "session_id"))
    yield _claude_code_claim(headers)
    yield _Claim("agent-hint", hint.session, hint.parent)
    for source, id_header, parent_header in _AGENT_HEADERS:
        parent = headers.get(parent_header) if parent_header else None
        yield _Claim(source, headers.get(id_header), parent)
    yield _Claim("prompt-cache-key", field("prompt_cache_key"))
    metadata = field("metadata")
    yield _Claim("metadata-user-id", _session_in_user_id(_entry(metadata, "user_id")))
    conversation = field("conversation")
    is_object = isinstance(conversation, Mapping)
    yield _Claim("conversation", _entry(conversation, "id") if is_object else conversation)
    yield _Claim("metadata-session-id", _entry(metadata, "session_id"))
    yield _Claim("metadata-thread-id", _entry(metadata, "thread_id"))


def _claude_code_claim(headers: Mapping[str, str]) -> _Claim:
    """The claim of Claude Code, which names the root session and the sub-agent that sends."""
    root: object = headers.get("x-claude-code-session-id")
    if not isinstance(root, str):
        return _Claim("claude-code", root)
    root_id = _escape_slash(root)
    child = _child_id(root_id, headers.get("x-claude-code-agent-id"))
    if child is None:
        return _Claim("claude-code", root_id)
    parent = _child_id(root_id, headers.get("x-claude-code-parent-agent-id"))
    return _Claim("claude-code", root_id, parent or root_id, child)


def _child_id(root_id: str, agent: object) -> str | None:
    """ "root/agent", or None when `agent` names no sub-agent.

    Agent ids need only be distinct among the children of one root, so they may be short, or plain
    names.
    """
    if not isinstance(agent, str) or not agent.strip() or has_control_characters(agent):
        return None
    agent_id = _escape_slash(agent)
    child = f"{root_id}/{agent_id}"
    return child if agent_id != root_id and len(child) <= MAX_ID_CHARS else None


def _escape_slash(text: str) -> str:
    """Escape "/", so that "a/b" + "c" and "a" + "b/c" give two different ids."""
    return text.replace("%", "%25").replace("/", "%2F")


def _claim_fault(claim: _Claim) -> str | None:
    fault = id_fault(claim.value)
    may_name_a_server = fault is None and claim.source in _MAY_NAME_A_SERVER
    if may_name_a_server and _is_gateway_cookie(str(claim.value)):
        return GATEWAY_COOKIE
    return fault


def _is_gateway_cookie(value: str) -> bool:
    """Whether this is Aibrix's X-Session-ID: base64 of "ip:port", which names a server."""
    try:
        padded = value + "=" * (-len(value) % 4)
        text = base64.b64decode(padded, altchars=b"-_", validate=True).decode("ascii")
        host, _, port = text.rpartition(":")
        ipaddress.ip_address(host.strip("[]"))
    except (binascii.Error, ValueError):
        return False
    return port.isdigit()


def _is_placeholder(value: str) -> bool:
    text = value.strip().casefold().strip("<>{}[]()$%\"'`")
    text = text.replace("_", "-").replace(" ", "-")
    is_one_character = len(set(text) - {"-"}) <= 1
    return is_one_character or text in PLACEHOLDERS


def _engine_id(source: Source, raw_id: str) -> str:
    return raw_id if source in _SOURCES_READ_BY_VLLM else f"{source}:{raw_id}"


def _parent_id(claim: _Claim) -> str | None:
    """The parent's id as the engine knows it; None when unusable or the turn's own id."""
    own_id = claim.child or claim.value
    if id_fault(claim.parent) is not None or claim.parent == own_id:
        return None
    return _engine_id(claim.source, str(claim.parent))


def _is_final(
    headers: Mapping[str, str], signs: Signs, hint: AgentHint, raw_id: str | None
) -> bool:
    """Whether the client releases the session of this turn, and not another one."""
    releases = (
        (signs.is_final, headers.get("x-dynamo-session-id")),
        (hint.is_final, hint.session),
    )
    return any(
        is_final and (not named or raw_id is None or named == raw_id)
        for is_final, named in releases
    )


def _session_in_user_id(user_id: object) -> object:
    """The session inside Claude Code's `metadata.user_id`; None for any other user id.

    It has two forms: "user_<hex>_account_<uuid>_session_<uuid>", and in newer versions a JSON
    object with device_id, account_uuid and session_id.
    """
    if not isinstance(user_id, str) or len(user_id) > MAX_JSON_CHARS:
        return None
    if user_id.startswith("{"):
        return (json_object(user_id) or {}).get("session_id")
    match = _USER_ID_SESSION.search(user_id)
    return match.group(1) if match else None


def _entry(container: object, name: str) -> object:
    return container.get(name) if isinstance(container, Mapping) else None


def key_of_client(headers: Mapping[str, str]) -> str:
    """The API key that a request was sent with; "" without one. Not to be kept or logged."""
    authorization: object = headers.get("authorization")
    if isinstance(authorization, str):
        scheme, _, credentials = authorization.strip().partition(" ")
        if scheme.casefold() == "bearer" and credentials.strip():
            return credentials.strip()
    for name in ("x-api-key", "api-key"):
        value: object = headers.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def _to_bytes(text: str) -> bytes:
    """Encode as UTF-8, including lone surrogates, which JSON bodies may contain."""
    return text.encode("utf-8", "surrogatepass")


def _sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
