# SPDX-License-Identifier: Apache-2.0
"""Where the messages of a prompt begin, and of which kind each is, read from its token ids.

In the engine core there are only ids, and only tokens show a boundary: a text that spells a
marker is text. One table per style says what begins at which special token; a vocabulary may
show several styles (Hermes 3 has Llama's and ChatML's), and then all their markers count.
Source: the chat templates of the models named at the tables, vllm/parser and vllm/tool_parsers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_stateful.types import TokenArray

MAX_HEADER = 48
"""Tokens behind a marker that are read for the role, the channel and the recipient."""

MAX_MARKERS = 16_384
"""More than so many at once are no conversation: nothing is cut then."""

MAX_WHITE = 3
"""Tokens of white space behind a marker or a header that belong to it."""

MAX_KNOWN_HEADERS = 1 << 14
"""Headers that are remembered. When there are more, all are forgotten and read again."""

UNREADABLE = "\ufffd"


class Kind(IntEnum):
    """What a segment of a prompt is."""

    OTHER = 0
    """Before the first message, or of a role that is not known."""
    SYSTEM = 1
    TOOLS = 2
    """Descriptions of tools, where a token sets them apart; else they are part of SYSTEM."""
    USER = 3
    ASSISTANT = 4
    REASONING = 5
    TOOL_CALL = 6
    TOOL_RESULT = 7


ANSWERS = frozenset({Kind.ASSISTANT, Kind.REASONING, Kind.TOOL_CALL})
"""The kinds of the segments of an answer."""


def begins_message(kind: Kind, before: Kind) -> bool:
    """Whether a segment begins a message, for people who count messages as clients do.

    Args:
        kind: of the segment.
        before: the kind of the segment before it.
    """
    if kind in ANSWERS:
        return before not in ANSWERS
    return kind in (Kind.SYSTEM, Kind.USER, Kind.TOOL_RESULT)


class Cuts(NamedTuple):
    """The segments of a prompt; each lasts until the next one begins."""

    starts: NDArray[np.int32]
    """Shape ``[num_segments]``: the token at which each begins, ascending."""
    kinds: NDArray[np.uint8]
    """Shape ``[num_segments]``: the ``Kind`` of each."""

    @classmethod
    def none(cls) -> Cuts:
        return cls(np.empty(0, np.int32), np.empty(0, np.uint8))

    def kind_of(self, place: int) -> Kind:
        """The kind of the segment that holds a token; OTHER before the first segment."""
        count = int(np.searchsorted(self.starts, place, side="right"))
        return Kind(int(self.kinds[count - 1])) if count else Kind.OTHER


_ANYWHERE = frozenset(Kind)
_AGENT = ANSWERS | {Kind.TOOL_RESULT}


class _Marker(NamedTuple):
    """What begins at a special token."""

    kind: Kind = Kind.OTHER
    within: frozenset[Kind] = _ANYWHERE
    """In segments of these kinds; in others the token is text (an example in a system prompt)."""
    behind: bool = False
    """The segment begins behind the marker, which ends the one before."""
    header: str = ""
    """A header follows; the group that matches it names the kind. OTHER when none does."""
    takes: tuple[str, ...] = ()
    """Markers that are part of this one where they follow it or its header."""


def _after(kind: Kind, ended: Kind) -> _Marker:
    """``kind`` begins behind a marker that ends a segment of kind ``ended``."""
    return _Marker(kind, frozenset({ended}), behind=True)


_HEADER_ENDS = ("<|end_header_id|>", "<|header_end|>", "<|message|>", "<|im_middle|>", "<|im_sep|>")
"""Tokens that end a header; a line break does as well."""
_HEADER_PARTS = ("<|channel|>", "<|constrain|>")
"""Tokens inside a header; in the patterns they are NUL, which no text can be taken for."""

_ROLE = (
    r"(?P<SYSTEM>system|developer)|(?P<USER>user)|(?P<ASSISTANT>assistant|model)"
    r"|(?P<TOOL_RESULT>tool|ipython|function|observation|environment)"
)
_KIMI_ROLE = r"(?P<TOOLS>tool_declare)|(?P<SYSTEM>system)|(?P<TOOL_RESULT>.+)"
_HARMONY = (
    r"(?P<SYSTEM>(?:system|developer)\b.*)|(?P<USER>user\b.*)"
    r"|(?P<TOOL_CALL>assistant\b.*\bto=(?!assistant\b).*)"
    r"|(?P<REASONING>assistant[^\0]*\0analysis\b.*)|(?P<ASSISTANT>assistant\b.*)"
    r"|(?P<TOOL_RESULT>functions\..*|tool\b.*|.*\bto=assistant\b.*)"
)

_INSIDE = {
    "<think>": _Marker(Kind.REASONING, frozenset({Kind.ASSISTANT})),
    "</think>": _after(Kind.ASSISTANT, Kind.REASONING),
    "<tool_call>": _Marker(Kind.TOOL_CALL, ANSWERS),
    "<tool_response>": _Marker(Kind.TOOL_RESULT, frozenset({Kind.TOOL_RESULT})),
}
"""Inside the messages of several styles. In other vocabularies they are text."""

_CHATML = {
    "<|im_start|>": _Marker(header=_ROLE, takes=("<tool_response>",)),
    "<start_of_turn>": _Marker(header=_ROLE),
}
"""Qwen, Hermes, SmolLM, Phi-4; Gemma. A user message that begins with a result is a result."""

_LLAMA = {
    "<|start_header_id|>": _Marker(header=_ROLE),
    "<|header_start|>": _Marker(header=_ROLE),
    "<|python_tag|>": _Marker(Kind.TOOL_CALL, ANSWERS),
    "<|python_start|>": _Marker(Kind.TOOL_CALL, ANSWERS),
}
"""Llama 3 and 4. Calls without a token in front are text of the assistant."""

_MISTRAL = {
    "[SYSTEM_PROMPT]": _Marker(Kind.SYSTEM),
    "[AVAILABLE_TOOLS]": _Marker(Kind.TOOLS),
    "[INST]": _Marker(Kind.USER),
    "[/INST]": _after(Kind.ASSISTANT, Kind.USER),
    "[THINK]": _Marker(Kind.REASONING, frozenset({Kind.ASSISTANT})),
    "[/THINK]": _after(Kind.ASSISTANT, Kind.REASONING),
    "[TOOL_CALLS]": _Marker(Kind.TOOL_CALL, ANSWERS),
    "[TOOL_RESULTS]": _Marker(Kind.TOOL_RESULT),
    "[/TOOL_RESULTS]": _after(Kind.ASSISTANT, Kind.TOOL_RESULT),
}
"""Mistral, tokenizer versions 2 to 13."""

_GPT_OSS = {"<|start|>": _Marker(header=_HARMONY)}

_DEEPSEEK = {
    "<｜begin▁of▁sentence｜>": _after(Kind.SYSTEM, Kind.OTHER),
    "<｜User｜>": _Marker(Kind.USER),
    "<｜Assistant｜>": _Marker(Kind.ASSISTANT),
    "<｜tool▁calls▁begin｜>": _Marker(Kind.TOOL_CALL, ANSWERS, takes=("<｜tool▁call▁begin｜>",)),
    "<｜tool▁call▁begin｜>": _Marker(Kind.TOOL_CALL, ANSWERS),
    "<｜tool▁outputs▁begin｜>": _Marker(
        Kind.TOOL_RESULT, _AGENT, takes=("<｜tool▁output▁begin｜>",)
    ),
    "<｜tool▁output▁begin｜>": _Marker(Kind.TOOL_RESULT, _AGENT),
    "<｜tool▁output▁end｜>": _after(Kind.ASSISTANT, Kind.TOOL_RESULT),
    "<｜tool▁outputs▁end｜>": _after(Kind.ASSISTANT, Kind.TOOL_RESULT),
}
"""DeepSeek V3, V3.1 and R1; the system prompt has no marker of its own."""

_GLM = {
    "<|system|>": _Marker(Kind.SYSTEM),
    "<|user|>": _Marker(Kind.USER),
    "<|assistant|>": _Marker(Kind.ASSISTANT),
    "<|observation|>": _Marker(Kind.TOOL_RESULT, takes=("<tool_response>",)),
}
"""GLM 4, and Phi-3, which has no observations."""

_KIMI = {
    "<|im_system|>": _Marker(header=_KIMI_ROLE),
    "<|im_user|>": _Marker(Kind.USER),
    "<|im_assistant|>": _Marker(Kind.ASSISTANT),
    "<|tool_calls_section_begin|>": _Marker(
        Kind.TOOL_CALL, ANSWERS, takes=("<|tool_call_begin|>",)
    ),
    "<|tool_call_begin|>": _Marker(Kind.TOOL_CALL, ANSWERS),
}

_STYLES: tuple[tuple[tuple[str, ...], Mapping[str, _Marker]], ...] = (
    (("<|im_start|>",), _CHATML),
    (("<start_of_turn>",), _CHATML),
    (("<|start_header_id|>", "<|end_header_id|>"), _LLAMA),
    (("<|header_start|>", "<|header_end|>"), _LLAMA),
    (("[INST]", "[/INST]"), _MISTRAL),
    (("<|start|>", "<|channel|>", "<|message|>"), _GPT_OSS),
    (("<｜User｜>", "<｜Assistant｜>"), _DEEPSEEK),
    (("<|user|>", "<|assistant|>"), _GLM),
    (("<|im_user|>", "<|im_assistant|>"), _KIMI),
)
"""The tokens that show a style, and its markers."""

_WHITE = "ĠĊĉč▁ \n\t\r"
_WHITE_BYTES = frozenset({"<0x09>", "<0x0A>", "<0x0D>", "<0x20>"})
"""White space in a vocabulary: of byte-level BPE, of SentencePiece, and as it is."""


class BoundaryRules:
    """What begins where in the token ids of one vocabulary. Made by ``of``."""

    def __init__(
        self,
        markers: Mapping[str, _Marker],
        vocabulary: Mapping[str, int],
        decode: Callable[[list[int]], str],
    ) -> None:
        ids = {text: vocabulary[text] for text in markers}
        self._markers = {ids[text]: marker for text, marker in markers.items()}
        self._taken = {
            ids[text]: {ids[taken]: markers[taken].kind for taken in marker.takes if taken in ids}
            for text, marker in markers.items()
        }
        self._headers = _Headers(frozenset(ids.values()), vocabulary, decode)
        self._is_marker = np.zeros(max(self._markers) + 3, np.bool_)
        self._is_marker[[token + 1 for token in self._markers]] = True
        self._white = {
            token
            for text, token in vocabulary.items()
            if not text.strip(_WHITE) or text in _WHITE_BYTES
        }

    @classmethod
    def of(
        cls, vocabulary: Mapping[str, int], decode: Callable[[list[int]], str]
    ) -> BoundaryRules | None:
        """The rules of a tokenizer; None when its vocabulary shows no style that is known.

        Args:
            vocabulary: text of each token, added tokens included, to its id.
            decode: the text of token ids. Asked once for each token that was ever seen in a
                header, and may fail.
        """
        markers: dict[str, _Marker] = {}
        for shown_by, style in _STYLES:
            if all(text in vocabulary for text in shown_by):
                markers |= style
        if not markers:
            return None
        markers |= _INSIDE
        known = {text: marker for text, marker in markers.items() if text in vocabulary}
        return cls(known, vocabulary, decode)

    @property
    def marker_ids(self) -> frozenset[int]:
        """The tokens at which, or behind which, a segment can begin."""
        return frozenset(self._markers)

    def cuts(self, tokens: TokenArray, start: int = 0, before: Kind = Kind.OTHER) -> Cuts:
        """The segments that begin at ``start`` or behind it. Never fails, whatever the ids.

        Positions count from the beginning of ``tokens``. That a segment begins at a token
        depends on nothing behind that token. Its kind depends on its header: when ``tokens``
        ends inside the header of the last one, its kind is what is known by then.

        Args:
            tokens: shape ``[num_tokens]``, the whole prompt. Only what is behind ``start``, and
                at most ``MAX_HEADER + MAX_WHITE + 1`` tokens before it, is read.
            before: the kind of the segment that holds the token before ``start``.
        """
        start = max(start, 0)
        low = max(start - MAX_HEADER - MAX_WHITE - 1, 0)
        # One is added so that negative ids, clipped to 0, are no marker.
        places = np.flatnonzero(self._is_marker.take(tokens[low:] + 1, mode="clip")) + low
        # The header of the last marker before `start`, or white space, may end behind `start`.
        # Playing that marker again, in the segment that it led to, changes nothing else.
        places = places[max(int(np.searchsorted(places, start)) - 1, 0) :]
        if len(places) > MAX_MARKERS:
            return Cuts.none()
        starts, kinds = self._play(tokens, places, int(before))
        first = 1 if starts and starts[0] < start else 0
        return Cuts(np.array(starts[first:], np.int32), np.array(kinds[first:], np.uint8))

    def extended(self, tokens: TokenArray, known: Cuts, num_same: int) -> Cuts:
        """All segments of a prompt that begins as another one did.

        Args:
            tokens: shape ``[num_tokens]``.
            known: all the segments of the other prompt.
            num_same: how many leading tokens the two share. Only what is behind the last
                segment that begins among them is read.
        """
        keep = max(int(np.searchsorted(known.starts, num_same)) - 1, 0)
        if keep == 0:
            return self.cuts(tokens)
        more = self.cuts(tokens, int(known.starts[keep]), Kind(int(known.kinds[keep - 1])))
        return Cuts(
            np.concatenate([known.starts[:keep], more.starts]),
            np.concatenate([known.kinds[:keep], more.kinds]),
        )

    def _play(
        self, tokens: TokenArray, places: NDArray[np.intp], kind: int
    ) -> tuple[list[int], list[int]]:
        """Starts and kinds of what begins at the markers, which stand at ``places``."""
        view = tokens.data  # one by one, read thrice as fast as from the array
        starts: list[int] = []
        kinds: list[int] = []
        ended, begin, taken = kind, -1, -1
        for place in places.tolist():
            if place == taken:
                continue
            marker = self._markers[view[place]]
            empty = place == begin  # what was to begin here, behind a marker, has no token
            if kind not in marker.within and not (
                empty and marker.behind and ended in marker.within
            ):
                continue
            if empty:
                del starts[-1], kinds[-1]
            if marker.behind:
                ended = ended if empty else kind
                kind, begin = marker.kind, self._skip_white(view, place + 1)
                starts.append(begin)
                kinds.append(kind)
                continue
            kind, behind = marker.kind, place + 1
            if marker.header:
                kind, behind = self._headers.read(marker.header, view, behind)
            if marker.takes:
                behind = self._skip_white(view, behind)
                result = self._taken[view[place]].get(view[behind] if behind < len(view) else -1)
                if result is not None and kind in (Kind.USER, result):
                    kind, taken = result, behind
            starts.append(place)
            kinds.append(kind)
        if starts and starts[-1] >= len(view):
            del starts[-1], kinds[-1]
        return starts, kinds

    def _skip_white(self, tokens: memoryview[int], place: int) -> int:
        """The first position from ``place`` on that holds no white space."""
        last = min(place + MAX_WHITE, len(tokens))
        while place < last and tokens[place] in self._white:
            place += 1
        return place


class _Header(NamedTuple):
    """A header, or the beginning of one."""

    kind: int
    complete: bool
    longer: dict[int, _Header]
    """Headers with one more token, by that token."""


class _Headers:
    """Reads headers; those that were read before are found in a tree over their tokens."""

    def __init__(
        self,
        markers: frozenset[int],
        vocabulary: Mapping[str, int],
        decode: Callable[[list[int]], str],
    ) -> None:
        self._markers = markers
        self._ends = {vocabulary[text] for text in _HEADER_ENDS if text in vocabulary}
        parts = [vocabulary[text] for text in _HEADER_PARTS if text in vocabulary]
        self._texts = dict.fromkeys(parts, "\0")
        self._num_ids = max(vocabulary.values()) + 1
        self._decode = decode
        self._known = defaultdict[str, _Header](lambda: _Header(Kind.OTHER, False, {}))
        self._num_known = 0

    def read(self, pattern: str, tokens: memoryview[int], place: int) -> tuple[int, int]:
        """The kind that the header at ``place`` tells, and the position behind the header."""
        known, first = self._known[pattern], place
        last = min(place + MAX_HEADER, len(tokens))
        while place < last and not known.complete:
            more = known.longer.get(tokens[place])
            if more is None:
                if tokens[place] in self._markers:
                    break
                more = self._learn(pattern, tokens[first : place + 1].tolist(), known)
            known = more
            place += 1
        return known.kind, place

    def _learn(self, pattern: str, header: list[int], shorter: _Header) -> _Header:
        if self._num_known >= MAX_KNOWN_HEADERS:
            self._known.clear()
            self._num_known = 0
        ended = header[-1] in self._ends
        text = "".join(map(self._text, header[:-1] if ended else header))
        match = re.fullmatch(pattern, text.partition("\n")[0].strip(" "))
        kind = Kind[match.lastgroup] if match and match.lastgroup else Kind.OTHER
        made = _Header(kind, ended or "\n" in text, {})
        shorter.longer[header[-1]] = made
        self._num_known += 1
        return made

    def _text(self, token: int) -> str:
        """The text of a token. No more of them are remembered than the vocabulary has."""
        text = self._texts.get(token)
        if text is not None:
            return text
        if not 0 <= token < self._num_ids:
            return UNREADABLE
        try:
            text = str(self._decode([token])).replace("\0", UNREADABLE)
        except Exception:
            text = UNREADABLE
        self._texts[token] = text
        return text
