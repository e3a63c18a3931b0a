# SPDX-License-Identifier: Apache-2.0
"""Tells clients of two vendors' APIs why not more of the prompt cache was reused.

A client names an earlier response. The request and the request of that response are compared by
their fingerprints (``session.fingerprint``), as the client sent them.

    POST /v1/messages          `diagnostics.previous_message_id`, answered with `diagnostics`
    POST /v1/responses         `prompt_cache_options.comparison_response_id`, answered with
                               `prompt_cache_diagnostics`
    POST /v1/chat/completions  the same; OpenAI has it for responses only

``identify`` makes a `Diagnosis` of a request and attaches it to the HTTP request. It is completed
where the answer is seen: for Messages by a hook (``anthropic_usage``), and for the other two by a
middleware (``openai_diagnostics``). Nothing here fails a request.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any

from vllm.logger import init_logger

from vllm_stateful.observe.diagnosis_counts import DIAGNOSIS_COUNTS
from vllm_stateful.session import Change, Fingerprint, Fingerprints, Reason, Remembered
from vllm_stateful.session.fingerprint import of_chat, of_messages, of_responses
from vllm_stateful.session.fingerprints import key_of

logger = init_logger("vllm.stateful")

MAX_ID_CHARS = 256

_STATE = "stateful_diagnosis"
_fingerprints = Fingerprints()


class _OtherServers:
    """Whether other API servers answer, too. They remember what they answered themselves."""

    are_there = False


_others = _OtherServers()


def watch(engine_core: Any) -> None:
    """Note whether there are other API servers, which may know a response that is unknown here.

    Args:
        engine_core: this API server's client of the engine cores.
    """
    _others.are_there = getattr(engine_core, "client_count", 1) > 1


class Api(StrEnum):
    """The APIs that are served, each by the end of its path."""

    MESSAGES = "/v1/messages"
    RESPONSES = "/v1/responses"
    CHAT = "/v1/chat/completions"


class Outcome(StrEnum):
    """The outcome of a comparison that found no difference, or that was not made."""

    FIRST = "first"
    """The client has nothing to compare with."""
    SAME = "same"
    NOT_FOUND = "not_found"
    UNAVAILABLE = "unavailable"
    MALFORMED = "malformed"


_UNREADABLE = object()
"""Stands for an id that could not be read."""


class Diagnosis:
    """The diagnosis of one request: what it asked for, and what was found.

    Args:
        api: the API that the request came to.
        owner: its tenant and its cache salt.
        now: its fingerprint; None where no fingerprints are remembered.
        is_asked: whether the client asked for the diagnosis.
    """

    def __init__(
        self, api: Api, owner: tuple[str, str], now: Fingerprint | None, *, is_asked: bool
    ) -> None:
        self.api = api
        self.is_asked = is_asked
        self.outcome: Outcome | Change = Outcome.FIRST
        self.before: Remembered | None = None
        self.has_usage_chunk = False
        """Whether a chat client wants the usage in the last chunk of a stream."""
        self._owner = owner
        self._now = now

    def compare_with(self, response_id: str) -> None:
        """Compare this request with the request that got a response."""
        if self._now is None:
            self.outcome = Outcome.UNAVAILABLE
            return
        now_s = time.monotonic()
        key = key_of(self.api, *self._owner, response_id)
        self.before = _fingerprints.find(key, now_s)
        if self.before is None:
            self.outcome = Outcome.UNAVAILABLE if _others.are_there else Outcome.NOT_FOUND
            return
        change = _fingerprints.compare_with(key, self.before, self._now, now_s)
        self.outcome = Outcome.SAME if change is None else change

    def answered(self, response_id: Any, num_prompt: Any) -> None:
        """Remember the request, so that later requests can be compared with it.

        Args:
            response_id: the id of the answer.
            num_prompt: the number of tokens in the prompt, where the answer says it.
        """
        if self._now is not None and isinstance(response_id, str):
            key = key_of(self.api, *self._owner, response_id)
            num_tokens = num_prompt if isinstance(num_prompt, int) else 0
            _fingerprints.keep(key, self._now, num_tokens, time.monotonic())

    def of_messages(self) -> dict[str, Any] | None:
        """The ``diagnostics`` field of a message."""
        found = self.outcome
        if found in (Outcome.FIRST, Outcome.SAME):
            return None
        if found is Outcome.NOT_FOUND:
            return {"cache_miss_reason": {"type": "previous_message_not_found"}}
        if not isinstance(found, Change) or found.reason is Reason.UNKNOWN:
            return {"cache_miss_reason": {"type": "unavailable"}}
        assert self.before is not None
        missed = found.tokens_behind(self.before.num_tokens)
        reason = {"type": str(found.reason), "cache_missed_input_tokens": missed}
        return {"cache_miss_reason": reason}

    def of_responses(self, num_cached: int | None) -> dict[str, Any]:
        """The ``prompt_cache_diagnostics`` field of a response.

        Args:
            num_cached: the number of this prompt's tokens that were read from the cache; None where
                it is not known.
        """
        found = self.outcome
        if found is Outcome.SAME:
            return {"type": "cache_hit"}
        if found is Outcome.NOT_FOUND:
            return {"type": "comparison_response_not_found"}
        if not isinstance(found, Change) or found.reason is Reason.UNKNOWN:
            return {"type": "unavailable"}
        assert self.before is not None
        missed, num_reusable = found.tokens_behind(self.before.num_tokens), self.before.num_prompt
        if num_reusable and num_cached is not None:
            missed = max(0, num_reusable - num_cached)
            if missed <= 1:  # the last token of a prompt is always computed
                return {"type": "cache_hit"}
        said: dict[str, Any] = {"type": "cache_miss", "reason": str(found.reason)}
        if num_reusable:
            said["comparison_reusable_tokens"] = num_reusable
        return {**said, "cache_missed_tokens": missed}


def diagnosis_of(raw_request: Any) -> Diagnosis | None:
    """The diagnosis of an HTTP request whose handler runs."""
    found = getattr(getattr(raw_request, "state", None), _STATE, None)
    return found if isinstance(found, Diagnosis) else None


def diagnosis_in(scope: Any) -> Diagnosis | None:
    """The diagnosis of an ASGI request."""
    return (scope.get("state") or {}).get(_STATE)


def begin(
    raw_request: Any, body: dict[str, Any], owner: tuple[str, str], *, is_on: bool
) -> Diagnosis | None:
    """Compare a request with the one that it names, and attach the result to the HTTP request.

    Args:
        raw_request: the HTTP request.
        body: the JSON body as the client sent it.
        owner: its tenant and its cache salt.
        is_on: whether fingerprints are remembered.

    Returns:
        None if the client asked for nothing and nothing is to be remembered.
    """
    scope = getattr(raw_request, "scope", None) or {}
    path = str(scope.get("path", ""))
    api = next((each for each in Api if path.endswith(each)), None)
    if api is None:
        return None
    try:
        made = _diagnose(api, raw_request, body, owner, is_on)
    except Exception as error:  # for example, a body that is nested too deeply
        logger.warning("stateful: a request could not be compared: %r", error)
        made = Diagnosis(api, owner, None, is_asked=_wish(api, body)[0])
        made.outcome = Outcome.UNAVAILABLE
    if made is not None:
        setattr(raw_request.state, _STATE, made)
        if made.is_asked:
            found = made.outcome
            DIAGNOSIS_COUNTS.add(str(found.reason if isinstance(found, Change) else found))
    return made


def _diagnose(
    api: Api, raw_request: Any, body: dict[str, Any], owner: tuple[str, str], is_on: bool
) -> Diagnosis | None:
    is_asked, named = _wish(api, body)
    if not is_asked and not (is_on and _is_remembered(api, body)):
        return None
    now = _fingerprint(api, raw_request, body, owner) if is_on else None
    made = Diagnosis(api, owner, now, is_asked=is_asked)
    options = body.get("stream_options")
    made.has_usage_chunk = isinstance(options, dict) and bool(options.get("include_usage"))
    if named is not None:
        if isinstance(named, str) and len(named) <= MAX_ID_CHARS:
            made.compare_with(named)
        else:
            made.outcome = Outcome.MALFORMED
    return made


def _wish(api: Api, body: dict[str, Any]) -> tuple[bool, Any]:
    """Whether a request asks for a diagnosis, and the id to compare with, if there is one."""
    if api is Api.MESSAGES:
        asked = body.get("diagnostics")
        if isinstance(asked, dict):
            return True, asked.get("previous_message_id")
        return asked is not None, None if asked is None else _UNREADABLE
    options = body.get("prompt_cache_options")
    named = options.get("comparison_response_id") if isinstance(options, dict) else None
    return named is not None, named


def _is_remembered(api: Api, body: dict[str, Any]) -> bool:
    """Whether a request may be compared with later: any Responses request may.

    Requests to the other APIs must say so with ``prompt_cache_options``.
    """
    return api is Api.RESPONSES or isinstance(body.get("prompt_cache_options"), dict)


def _fingerprint(
    api: Api, raw_request: Any, body: dict[str, Any], owner: tuple[str, str]
) -> Fingerprint:
    if api is Api.MESSAGES:
        headers = raw_request.headers.items()
        return of_messages(body, [value for name, value in headers if name == "anthropic-beta"])
    if api is Api.CHAT:
        return of_chat(body)
    previous = body.get("previous_response_id")
    return of_responses(body, key_of(api, *owner, previous) if isinstance(previous, str) else b"")
