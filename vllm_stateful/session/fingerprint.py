# SPDX-License-Identifier: Apache-2.0
"""Finds where two requests of one conversation differ, from hashes and lengths without their text.

A `Fingerprint` is made of the JSON body that a client sent. Two bodies have equal parts only if
they are the same, even in the order of the keys in a tool's schema. Three things that change no
prompt are ignored:

- Breakpoints (``cache_control``, ``prompt_cache_breakpoint``) do not count. Clients move them.
- A text and a list with one block of that text are the same.
- The order of the keys of a message or of a block does not count.

The answer that a client appends is not known here. So a history that only grew is no change.
"""

from __future__ import annotations

import hashlib
import marshal
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from typing import Any, NamedTuple

ITEM_BYTES = 8
"""The length of a digest in bytes."""

_MARSHAL = 2
"""The last format of ``marshal`` that writes equal values as equal bytes. It is also the fastest
one to write."""

_MARKS = frozenset({"cache_control", "prompt_cache_breakpoint"})
_TEXT_TYPES = frozenset({"text", "input_text", "output_text"})
_ATTRIBUTION = "x-anthropic-billing-header"
"""The beginning of a block in Claude Code's system prompt. The block is different in each request,
and vLLM leaves it out of the prompt."""

_DIAGNOSIS_BETA = "cache-diagnosis-"
_MESSAGES_SETTINGS = (
    "tool_choice",
    "thinking",
    "context_management",
    "output_config",
    "output_format",
    "chat_template_kwargs",
)
_COMPACTION_TYPES = frozenset({"compaction", "compaction_summary"})


class Reason(StrEnum):
    """The kind of the first difference, in the words of the two vendors."""

    MODEL = "model_changed"
    SYSTEM = "system_changed"
    TOOLS = "tools_changed"
    MESSAGES = "messages_changed"
    KEY = "prompt_cache_key_changed"
    TIER = "service_tier_changed"
    FORMAT = "text_format_changed"
    EFFORT = "reasoning_effort_changed"
    VERBOSITY = "verbosity_changed"
    COMPACTED = "context_compacted"
    INPUT = "input_changed"
    UNKNOWN = "unavailable"
    """Something else differs, or it cannot be told."""


class Change(NamedTuple):
    """The first difference between two requests.

    Attributes:
        reason: what differs.
        share: how much of the earlier request lies behind the difference, from 0 to 1, by its
            length in bytes.
    """

    reason: Reason
    share: float = 1.0

    def tokens_behind(self, num_prompt: int) -> int:
        """The estimated number of tokens of the earlier prompt that lie behind the difference.

        Args:
            num_prompt: the number of tokens in the earlier prompt.
        """
        return ceil(self.share * num_prompt)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The fingerprint of one request.

    Attributes:
        facts: a digest of each part except the history, in the order in which they are compared.
        num_head: the bytes of what comes before the history.
        items: the digests of the messages, joined, ``ITEM_BYTES`` each.
        ends: for each message, the bytes of the history up to its end.
        compactions: the digests of the items that stand for an earlier history.
        previous: the key of the response whose conversation this request continues without
            repeating it. Empty where there is none.
    """

    facts: tuple[tuple[Reason, bytes], ...]
    num_head: int
    items: bytes
    ends: array[int]
    compactions: frozenset[bytes] = frozenset()
    previous: bytes = b""

    @property
    def num_request(self) -> int:
        """The bytes of the whole request."""
        return self.num_head + (self.ends[-1] if self.ends else 0)

    @property
    def num_bytes(self) -> int:
        """The bytes of memory that it takes, estimated."""
        return 512 + 64 * len(self.facts) + len(self.items) + 8 * len(self.ends)

    def share_behind(self, num_items: int) -> float:
        """The share of its bytes that lies behind the first ``num_items`` messages, 0 to 1."""
        before = self.num_head + (self.ends[num_items - 1] if num_items else 0)
        return 1.0 - before / max(1, self.num_request)


def of_messages(body: Mapping[str, Any], betas: Iterable[str] = ()) -> Fingerprint:
    """The fingerprint of a Messages request (Anthropic).

    Args:
        body: the JSON body as the client sent it.
        betas: the values of its ``anthropic-beta`` headers.
    """
    system, tools = _image(_blocks(body.get("system"))), _tools(body)
    active = {name.strip() for value in betas for name in value.split(",")}
    active = {name for name in active if name and not name.startswith(_DIAGNOSIS_BETA)}
    settings = [body.get(name) for name in _MESSAGES_SETTINGS]
    facts = (
        (Reason.MODEL, _digest(_image([body.get("model"), body.get("speed")]))),
        (Reason.SYSTEM, _digest(system)),
        (Reason.TOOLS, _digest(tools)),
        (Reason.UNKNOWN, _digest(_image([settings, sorted(active)]))),
    )
    return _with_items(facts, len(system) + len(tools), body.get("messages"))


def of_chat(body: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of a chat completion request (OpenAI)."""
    tools = _tools(body)
    settings = (body.get("response_format"), body.get("reasoning_effort"), body.get("verbosity"))
    return _with_items(_openai_facts(body, tools, *settings), len(tools), body.get("messages"))


def of_responses(body: Mapping[str, Any], previous: bytes = b"") -> Fingerprint:
    """The fingerprint of a Responses request (OpenAI).

    Args:
        body: the JSON body as the client sent it.
        previous: see `Fingerprint`.
    """
    tools, instructions = _tools(body), _image(body.get("instructions"))
    text, reasoning = _object(body.get("text")), _object(body.get("reasoning"))
    settings = (text.get("format"), reasoning.get("effort"), text.get("verbosity"))
    facts = (*_openai_facts(body, tools, *settings), (Reason.INPUT, _digest(instructions)))
    items = body.get("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    return _with_items(facts, len(tools) + len(instructions), items, previous)


def compare(before: Fingerprint, now: Fingerprint, *, grew: bool | None = None) -> Change | None:
    """The first difference in the vendor's order; None if the history only grew.

    Args:
        before: the earlier request.
        now: a later one to the same API.
        grew: True if the later request is known to continue the conversation of the earlier one.
            False if that is not known. None if their messages must be compared.
    """
    input_differs = None
    for (reason, was), (_, digest) in zip(before.facts, now.facts, strict=True):
        if was == digest:
            continue
        if reason is not Reason.INPUT:
            return Change(reason)
        input_differs = Change(reason)
    if input_differs is None and grew is not None:
        return None if grew else Change(Reason.UNKNOWN)
    if input_differs is None:
        input_differs = _first_changed_item(before, now)
    if input_differs is not None and now.compactions - before.compactions:
        return Change(Reason.COMPACTED, input_differs.share)
    return input_differs


def _first_changed_item(before: Fingerprint, now: Fingerprint) -> Change | None:
    if now.items.startswith(before.items):
        return None
    num_same = 0
    for start in range(0, min(len(before.items), len(now.items)), ITEM_BYTES):
        end = start + ITEM_BYTES
        if before.items[start:end] != now.items[start:end]:
            break
        num_same += 1
    is_messages = any(reason is Reason.SYSTEM for reason, _ in before.facts)
    return Change(Reason.MESSAGES if is_messages else Reason.INPUT, before.share_behind(num_same))


def _openai_facts(
    body: Mapping[str, Any], tools: bytes, text_format: Any, effort: Any, verbosity: Any
) -> tuple[tuple[Reason, bytes], ...]:
    """The facts of an OpenAI request; a default value counts as no value."""
    tier = body.get("service_tier")
    if _object(text_format).get("type") == "text":
        text_format = None
    said = (
        (Reason.MODEL, body.get("model")),
        (Reason.KEY, body.get("prompt_cache_key")),
        (Reason.TIER, None if tier == "auto" else tier),
        (Reason.TOOLS, tools),
        (Reason.FORMAT, text_format),
        (Reason.EFFORT, effort),
        (Reason.VERBOSITY, None if verbosity == "medium" else verbosity),
        (Reason.UNKNOWN, [body.get("chat_template"), body.get("chat_template_kwargs")]),
    )
    return tuple(
        (reason, _digest(value if isinstance(value, bytes) else _image(value)))
        for reason, value in said
    )


def _with_items(
    facts: tuple[tuple[Reason, bytes], ...], num_head: int, items: Any, previous: bytes = b""
) -> Fingerprint:
    digests, ends, compactions, end = [], array("Q"), set(), 0
    for item in items if isinstance(items, list) else ():
        image = _image(_item(item))
        end += len(image)
        ends.append(end)
        digest = _digest(image)
        digests.append(digest)
        if isinstance(item, dict) and item.get("type") in _COMPACTION_TYPES:
            compactions.add(digest)
    joined = b"".join(digests)
    return Fingerprint(facts, num_head, joined, ends, frozenset(compactions), previous)


def _item(item: Any) -> Any:
    """A message, or another item of an input, in a canonical form."""
    if not isinstance(item, dict):
        return item
    said = {name: item[name] for name in sorted(item) if name not in _MARKS}
    if said.get("type") == "message":
        del said["type"]
    if "content" in said:
        said["content"] = _blocks(said["content"])
    return said


def _blocks(content: Any, *, is_inside: bool = False) -> Any:
    """The content of a message, a system prompt or a tool's result in a canonical form."""
    if isinstance(content, str):
        return [{"text": content, "type": "text"}]
    if not isinstance(content, list):
        return content
    return [_block(block, is_inside) for block in content if not _is_attribution(block)]


def _block(block: Any, is_inside: bool) -> Any:
    if not isinstance(block, dict):
        return block
    said = {name: block[name] for name in sorted(block) if name not in _MARKS}
    if isinstance(said.get("type"), str) and said["type"] in _TEXT_TYPES:
        said["type"] = "text"
    if "content" in said and not is_inside:
        said["content"] = _blocks(said["content"], is_inside=True)
    return said


def _is_attribution(block: Any) -> bool:
    text = block.get("text") if isinstance(block, dict) else None
    return isinstance(text, str) and text.startswith(_ATTRIBUTION)


def _tools(body: Mapping[str, Any]) -> bytes:
    """The image of the tools, in their order; an empty list counts as no tools."""
    tools = body.get("tools")
    if not isinstance(tools, list):
        return _image(tools)
    return _image([_tool(tool) for tool in tools] or None)


def _tool(tool: Any) -> Any:
    if not isinstance(tool, dict):
        return tool
    said = {name: value for name, value in tool.items() if name not in _MARKS}
    function = said.get("function")
    if isinstance(function, dict):
        said["function"] = {name: each for name, each in function.items() if name not in _MARKS}
    return said


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _image(value: Any) -> bytes:
    """The bytes of a JSON value; the order of keys counts, because prompts show it.

    Raises:
        ValueError: the value is nested too deeply.
    """
    return marshal.dumps(value, _MARSHAL)


def _digest(image: bytes) -> bytes:
    return hashlib.blake2b(image, digest_size=ITEM_BYTES).digest()
