# SPDX-License-Identifier: Apache-2.0
"""Tokenize a text that continues an earlier one, from the last safe cut before the two differ.

The result equals that of tokenizing the whole text. ``safe_cuts`` explains why, ``probe`` tries
each tokenizer at start-up, and ``--stateful-verify-tokens`` checks results while serving.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from vllm_stateful.render.safe_cuts import ByteArray, CutRules, Cuts
from vllm_stateful.render.splicer import Splicer
from vllm_stateful.render.text_memory import Entry, Found, TextMemory
from vllm_stateful.transport.prompt_ids import DIGEST_TOKENS, LastPlace, PromptTokenIds

MIN_BYTES = 1024
"""Length below which a text is tokenized in full: there is nothing to gain."""

MAX_RUNS = 32
"""The most runs that a remembered text's ids may consist of. Beyond that they are joined into
one."""

Encode = Callable[[str, bool], Sequence[int]]
"""Tokenizes a text in full. The flag tells whether special tokens are added around it."""


class Start(NamedTuple):
    """Where tokenizing begins. The token ids of the part before it are known."""

    found: Found | None
    num_cuts: int
    """Cuts of the found entry up to the start, the start itself included."""
    byte: int
    token: int
    answer: tuple[int, ...] = ()
    """Generated ids that replace those of the text just before ``byte``; they end at ``token``."""


_versions = itertools.count(1)
"""Numbers the prompts of this process. ``transport`` refers to prompts by these numbers."""

COLD = Start(None, 0, 0, 0)


class IncrementalTokenizer:
    """Tokenizes texts for one model.

    Args:
        rules: where texts may be cut.
        num_leading: tokens that the tokenizer puts in front when special tokens are added. None if
            it also adds some behind; texts with special tokens are then left to vLLM.
        vocab_size: one more than the largest valid token id.
        memory: the earlier texts.
        splicer: keeps generated ids in a history (``--stateful-history generated``). With None,
            every history is tokenized anew, as in stock vLLM.
    """

    def __init__(
        self,
        rules: CutRules,
        num_leading: int | None,
        vocab_size: int,
        memory: TextMemory,
        splicer: Splicer | None = None,
    ) -> None:
        self.rules = rules
        self.memory = memory
        self._splicer = splicer
        self.min_bytes = MIN_BYTES
        self._num_leading = num_leading
        self._shared_ints = list(range(vocab_size))

    def tokenize(
        self, text: str, encode: Encode, *, tenant: Hashable, add_special_tokens: bool
    ) -> PromptTokenIds | None:
        """Tokenize a text.

        Args:
            text: the whole prompt.
            encode: tokenizes a part of it.
            tenant: only texts of this tenant are used.
            add_special_tokens: as in the tokenizer's call.

        Returns:
            The token ids; None when the text is short, cannot be cut, or contains something that
            is left to vLLM (a lone surrogate, an id out of range).
        """
        if len(text) < self.min_bytes or (add_special_tokens and self._num_leading is None):
            return None
        try:
            data = text.encode()
        except UnicodeEncodeError:
            return None
        scope = (tenant, add_special_tokens)
        view = np.frombuffer(data, np.uint8)
        start = self._start(self.memory.find(scope, view), data)
        rest = data[start.byte :].decode() if start.byte else text
        new_ids = encode(rest, add_special_tokens and start.byte == 0)
        return self._assemble(scope, data, view, start, new_ids)

    def _start(self, found: Found | None, data: bytes) -> Start:
        if found is None:
            return COLD
        if self._splicer is not None and found.num_bytes == found.entry.num_bytes:
            splice = self._splicer.splice(found.entry, data, self.rules)
            if splice is not None:
                num_cuts = len(found.entry.cuts) + 1
                num_tokens = found.entry.num_tokens + len(splice.answer)
                return Start(found, num_cuts, splice.byte, num_tokens, splice.answer)
        cuts = found.entry.cuts
        count = cuts.last_within(found.num_bytes - self.rules.reach)
        if count == 0 or cuts.byte_positions[count - 1] == 0:
            return COLD
        return Start(
            found,
            count,
            int(cuts.byte_positions[count - 1]),
            int(cuts.token_positions[count - 1]),
        )

    def _assemble(
        self,
        scope: tuple[Hashable, bool],
        data: bytes,
        view: ByteArray,
        start: Start,
        new_ids: Sequence[int],
    ) -> PromptTokenIds | None:
        num_leading = (self._num_leading or 0) if scope[1] and start.byte == 0 else 0
        array = np.array(new_ids[num_leading:], np.int64)
        if len(array) and not 0 <= int(array.min()) <= int(array.max()) < len(self._shared_ints):
            return None
        tail = self.rules.find(data[start.byte :], array.astype(np.int32))
        if tail is None:
            return None
        ids = self._continue(start, new_ids)
        known = Cuts.none() if start.found is None else start.found.entry.cuts
        # The first cut of the tail is the start itself.
        cuts = known.joined(max(start.num_cuts - 1, 0), tail, start.byte, start.token + num_leading)
        made = Entry(
            scope,
            ids.version,
            len(data),
            _runs_of(ids, start.found),
            len(ids),
            cuts,
            ids.last_places,
            ids.digests,
            answers=[],
            is_spliced=ids.is_spliced,
        )
        self.memory.keep(view, made, start.found)
        return ids

    def _continue(self, start: Start, new_ids: Sequence[int]) -> PromptTokenIds:
        version = next(_versions)
        shared = map(self._shared_ints.__getitem__, new_ids)
        if start.found is None:
            return PromptTokenIds(shared, version=version)
        entry = start.found.entry
        num_parent_tokens = start.token - len(start.answer)
        ids = PromptTokenIds(
            entry.token_runs[0],
            version=version,
            parent=entry.version,
            num_parent_tokens=num_parent_tokens,
            parent_ends=start.found.is_continued,
            is_spliced=entry.is_spliced or bool(start.answer),
            last_places=_last_places_within(entry, num_parent_tokens),
            digests=entry.digests[: num_parent_tokens // DIGEST_TOKENS],
        )
        for run in entry.token_runs[1:]:
            ids += run
        del ids[num_parent_tokens:]
        ids += map(self._shared_ints.__getitem__, start.answer)
        ids += shared
        return ids


def _runs_of(ids: PromptTokenIds, found: Found | None) -> tuple[tuple[int, ...], ...]:
    """The ids of a text as runs. Runs shared with the text that it continues are not copied."""
    if found is None or len(found.entry.token_runs) >= MAX_RUNS:
        return (tuple(ids),)
    runs, num_left = [], ids.num_parent_tokens
    for run in found.entry.token_runs:
        runs.append(run[:num_left])
        num_left -= len(runs[-1])
        if num_left == 0:
            break
    return (*runs, tuple(ids[ids.num_parent_tokens :]))


def _last_places_within(entry: Entry, num_tokens: int) -> dict[int, LastPlace]:
    known = {token_id: last.within(num_tokens) for token_id, last in [*entry.last_places.items()]}
    return {token_id: last for token_id, last in known.items() if last is not None}
