# SPDX-License-Identifier: Apache-2.0
"""API process: which prompts each engine core was sent, and what to send of the next one.

A message is delivered in order, so a version that was sent to an engine is there when the next
message arrives, unless the engine gave it up; then it says so, and the prompt is sent in full.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

from vllm_stateful.transport.header import NO_VERSION, PromptHeader
from vllm_stateful.transport.prompt_ids import PromptTokenIds

MAX_VERSIONS = 65536
"""Versions remembered per engine: 100 bytes each. An older one is sent in full again."""

MIN_SAVED_TOKENS = 256
"""A base that spares fewer tokens is not worth a header."""


class Parcel(NamedTuple):
    """What goes to the engine for one prompt."""

    header: PromptHeader
    token_ids: list[int]

    @property
    def is_delta(self) -> bool:
        return self.header.parent != NO_VERSION


class SentVersions:
    """Per engine core, the versions that it was sent.

    Args:
        client: see ``PromptHeader.client``.
    """

    def __init__(self, client: str) -> None:
        self.client = client
        self._sent: dict[Hashable, OrderedDict[int, None]] = {}

    def pack(self, engine: Hashable, ids: PromptTokenIds) -> Parcel:
        """Decide what to send of a prompt, and note that its version is on its way.

        Args:
            engine: where it goes.
            ids: the whole prompt, with a version.
        """
        sent = self._sent.setdefault(engine, OrderedDict())
        if ids.version in sent:  # n > 1 answers to one prompt, or a repeated one
            sent.move_to_end(ids.version)
            header = PromptHeader(self.client, NO_VERSION, ids.version, len(ids))
            return Parcel(header, [])
        knows_parent = ids.parent in sent and ids.num_parent_tokens >= MIN_SAVED_TOKENS
        sent[ids.version] = None
        while len(sent) > MAX_VERSIONS:
            sent.popitem(last=False)
        if not knows_parent:
            return Parcel(PromptHeader(self.client, ids.version), ids)
        kept = ids.num_parent_tokens
        header = PromptHeader(self.client, ids.version, ids.parent, kept, ids.parent_ends)
        return Parcel(header, ids[kept:])

    def forget(self, engine: Hashable, ids: PromptTokenIds) -> None:
        """The engine did not hold what this prompt was based on, nor the prompt itself now."""
        sent = self._sent.get(engine)
        if sent is not None:
            sent.pop(ids.version, None)
            sent.pop(ids.parent, None)
