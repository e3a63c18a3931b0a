# SPDX-License-Identifier: Apache-2.0
"""The story of each session: its turns so far, where it came from, and how its KV was lost.

A story is kept longer than the KV, because it must explain a cold turn. Nothing is decided by it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm_stateful.session.turn_record import Cause, TurnRecord
from vllm_stateful.types import Demotion, Identity, SessionKey, Shape

MAX_SESSIONS = 10_000
"""The most sessions that are remembered. The one with the oldest last turn is forgotten first."""

MAX_CHILDREN = 64
"""The most children of a session that are remembered."""

MAX_IDENTITIES = 8
"""The most identities of a session id that are remembered."""


@dataclass(slots=True)
class Gone:
    """KV of a session that was given back."""

    why: Demotion
    at_s: float
    num_kept: int
    """The number of tokens from the beginning whose KV stayed."""


@dataclass(slots=True)
class Story:
    """What is known of one session.

    Attributes:
        session: its key.
        since_s: when its first turn was admitted, on the engine's clock.
        used_s: when its last turn was admitted, preempted or ended.
        num_turns: the number of turns that were admitted.
        num_running: the number of these turns that have not ended.
        frontier: the number of tokens whose KV the last turn left, or would have left if its KV
            had not been given back. Turns without any do not count.
        last: the record of the last turn.
        parent: the session that its client named as parent, or on whose KV its first turn began.
        children: the sessions with this one as parent, the newest last.
        gone: how its KV was given back most recently, since its last turn; None if it was not.
        shape: ``Shape.TOOLS`` once a turn of it had tools; ``Shape.BARE`` as long as all its turns
            are bare; else ``Shape.OTHER``.
        window: the number of its client's context window, as its last turn that has one says.
    """

    session: SessionKey
    since_s: float
    used_s: float
    num_turns: int = 0
    num_running: int = 0
    frontier: int = 0
    last: TurnRecord | None = None
    parent: SessionKey | None = None
    children: list[SessionKey] = field(default_factory=list)
    gone: Gone | None = None
    shape: Shape = Shape.BARE
    window: int | None = None

    def add_shape(self, shape: Shape) -> None:
        """Note the shape of one more turn."""
        if Shape.TOOLS in (shape, self.shape):
            self.shape = Shape.TOOLS
        elif shape is not Shape.BARE:
            self.shape = Shape.OTHER


class SessionBook:
    """The stories of one engine core. Not thread-safe: only the scheduler's thread uses them.

    Args:
        max_sessions: the most stories that are kept.
    """

    def __init__(self, max_sessions: int = MAX_SESSIONS) -> None:
        self._max = max_sessions
        self._stories: OrderedDict[SessionKey, Story] = OrderedDict()
        self._identities: dict[str, list[Identity]] = {}

    def __len__(self) -> int:
        return len(self._stories)

    def story(self, session: SessionKey) -> Story | None:
        """What is known of a session."""
        return self._stories.get(session)

    def newest_first(self) -> Iterator[Story]:
        """All stories, first the one of the session with the newest turn."""
        return reversed(self._stories.values())

    def identities(self, session_id: str) -> list[Identity]:
        """The identities under which a session id is known."""
        return self._identities.get(session_id, [])

    def admitted(
        self,
        record: TurnRecord,
        parent: SessionKey | None,
        now_s: float,
        shape: Shape = Shape.OTHER,
    ) -> None:
        """Note that a turn begins, and tell its record which context window was before it.

        Args:
            record: its record, which names its session.
            parent: the parent session, if there is one. See `Story`.
            now_s: the engine's clock.
            shape: what its request is made of.
        """
        session = record.session
        story = self._stories.get(session)
        if story is None:
            story = self._stories[session] = Story(session, now_s, now_s, parent=parent)
            self._note_identity(session)
            if parent is not None:
                self._note_child(parent, session)
        story.num_turns += 1
        story.num_running += 1
        story.used_s, story.last = now_s, record
        if record.missed.cause is not Cause.SIDE_REQUEST:
            story.gone = None
        story.add_shape(shape)
        if record.said.window is not None:
            record.window_before, story.window = story.window, record.said.window
        self._stories.move_to_end(session)
        while len(self._stories) > self._max:
            forgotten, _ = self._stories.popitem(last=False)
            self._forget_identity(forgotten)

    def ended(
        self,
        session: SessionKey,
        frontier: int,
        now_s: float,
        *,
        is_kept: bool = False,
        is_beside: bool = False,
    ) -> None:
        """A turn has ended.

        Args:
            session: its session.
            frontier: the number of tokens whose KV it leaves; 0 when it leaves none.
            now_s: the engine's clock.
            is_kept: whether the session has its KV: what it had lost before is there again.
            is_beside: whether it stood beside the session's history, which is as it was before.
        """
        story = self._stories.get(session)
        if story is not None:
            story.num_running = max(0, story.num_running - 1)
            story.used_s = now_s
            if not is_beside:
                story.frontier = frontier or story.frontier
            if is_kept and not is_beside:
                story.gone = None

    def demoted(self, session: SessionKey, why: Demotion, num_kept: int, now_s: float) -> None:
        """Note that KV of a session was given back.

        Args:
            session: the session.
            why: the reason.
            num_kept: the number of tokens from the beginning whose KV stayed.
            now_s: the engine's clock.
        """
        story = self._stories.get(session)
        if story is not None and why is not Demotion.SUPERSEDED:
            story.gone = Gone(why, now_s, num_kept)

    def lost(self, session: SessionKey, why: Demotion, frontier: int, now_s: float) -> None:
        """Note that nothing is kept of a turn.

        Args:
            session: its session.
            why: the reason.
            frontier: the number of tokens whose KV the turn had.
            now_s: the engine's clock.
        """
        story = self._stories.get(session)
        if story is not None:
            story.used_s, story.frontier = now_s, frontier
            story.gone = Gone(why, now_s, 0)

    def _note_identity(self, session: SessionKey) -> None:
        known = self._identities.setdefault(session.session_id, [])
        if session.identity not in known and len(known) < MAX_IDENTITIES:
            known.append(session.identity)

    def _forget_identity(self, session: SessionKey) -> None:
        known = self._identities.get(session.session_id, [])
        if session.identity in known:
            known.remove(session.identity)
        if not known:
            self._identities.pop(session.session_id, None)

    def _note_child(self, parent: SessionKey, child: SessionKey) -> None:
        story = self._stories.get(parent)
        if story is not None:
            story.children.append(child)
            del story.children[:-MAX_CHILDREN]
