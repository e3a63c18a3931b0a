# SPDX-License-Identifier: Apache-2.0
"""Reads what headers say of a turn beside its session: its end, a compaction, a retry, a window."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import NamedTuple

from vllm_stateful.types import HintSource

MAX_JSON_CHARS = 8192

_TRUE, _FALSE = frozenset({"1", "true"}), frozenset({"", "0", "false"})


class Signs(NamedTuple):
    """What a client said in its headers.

    Attributes:
        is_final: whether this is the last turn of the session in ``x-dynamo-session-id``.
        compaction: whether the turn summarizes its own history.
        retry: how often the client's library had sent the same request before.
        window: the number of the context window, where the client counts them.
        ignored: the headers that could not be read.
    """

    is_final: bool = False
    compaction: bool = False
    retry: int = 0
    window: int | None = None
    ignored: frozenset[HintSource] = frozenset()


def signs_of(headers: Mapping[str, str]) -> Signs:
    """What the headers of a request say of its turn.

    Args:
        headers: looked up by lower-case names.

    Raises nothing for any value.
    """
    ignored: set[HintSource] = set()
    is_final = _flag(headers.get("x-dynamo-session-final"), HintSource.SESSION_FINAL, ignored)
    compacts = _flag(headers.get("x-deepseek-harness-compact"), HintSource.COMPACTION, ignored)
    turn: object = headers.get("x-codex-turn-metadata")
    metadata = json_object(turn)
    if turn and metadata is None:
        ignored.add(HintSource.COMPACTION)
    is_codex_compaction = (metadata or {}).get("request_kind") == "compaction"
    count, named = headers.get("x-stainless-retry-count"), headers.get("x-codex-window-id")
    retry = _number(count, r"([0-9]{1,3})", HintSource.RETRY, ignored)
    window = _number(named, r".{1,256}:([0-9]{1,6})", HintSource.WINDOW, ignored)
    return Signs(is_final, compacts or is_codex_compaction, retry or 0, window, frozenset(ignored))


def json_object(text: object) -> Mapping[str, object] | None:
    """``text`` parsed as a JSON object; None if it is not one, or longer than `MAX_JSON_CHARS`."""
    if not isinstance(text, str) or not 0 < len(text) <= MAX_JSON_CHARS:
        return None
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _flag(value: object, source: HintSource, ignored: set[HintSource]) -> bool:
    if value is None:
        return False
    said = value.strip().casefold() if isinstance(value, str) else None
    if said not in _TRUE and said not in _FALSE:
        ignored.add(source)
    return said in _TRUE


def _number(
    value: object, pattern: str, source: HintSource, ignored: set[HintSource]
) -> int | None:
    """The number in a header: a retry count, or the window in Codex's ``<thread>:<window>``."""
    if value is None or value == "":
        return None
    found = re.fullmatch(pattern, value) if isinstance(value, str) else None
    if found is None:
        ignored.add(source)
        return None
    return int(found.group(1))


def has_control_characters(text: str) -> bool:
    """Whether `text` contains control characters, line separators or lone surrogates."""
    if text.isprintable():
        return False
    return any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in text)
