# SPDX-License-Identifier: Apache-2.0
"""API process: the prompts that each engine core was sent, and what to send of the next one.

Messages arrive in order. So a version that was sent to an engine core is there when the next
message arrives, unless the engine core gave it up. It then says so, and the prompt is sent in full.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

from vllm_stateful.transport.header import NO_VERSION, PromptHeader
from vllm_stateful.transport.prompt_ids import PromptTokenIds

MAX_VERSIONS = 65536
"""Versions remembered per engine core, at 100 bytes each. Older ones are sent in full again."""

MIN_SAVED_TOKENS = 256
"""Tokens that a base must save. One that saves fewer is not worth a header."""


class Parcel(NamedTuple):
    """What is sent to the engine core for one prompt."""

    header: PromptHeader
    token_ids: list[int]

    @property
    def is_delta(self) -> bool:
        return self.header.parent != NO_VERSION


class SentVersions:
    """The versions that each engine core was sent.

    Args:
        client: see ``PromptHeader.client``.
    """

    def __init__(self, client: str) -> None:
        self.client = client
        self._sent: dict[Hashable, OrderedDict[int, None]] = {}

    def pack(self, engine: Hashable, ids: PromptTokenIds) -> Parcel:
        """Decide what to send of a prompt, and remember its version as sent.

        Args:
            engine: the engine core that gets the prompt.
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
        """Forget a prompt and its base, as the engine core did not hold the base."""
        sent = self._sent.get(engine)
        if sent is not None:
            sent.pop(ids.version, None)
            sent.pop(ids.parent, None)
