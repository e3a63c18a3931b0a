# SPDX-License-Identifier: Apache-2.0
"""Says why a turn did not reuse more, from what was found and from the story of its session."""

from __future__ import annotations

from typing import NamedTuple

from vllm_stateful.session.session_book import SessionBook, Story
from vllm_stateful.session.turn_record import Cause, Missed
from vllm_stateful.types import SessionKey, Shape

NOT_KEPT = "not_kept"
"""Nothing was given back: the turn before still runs, or it failed, or it left nothing."""


class Found(NamedTuple):
    """What a lookup found.

    Attributes:
        num_prompt: the number of tokens in the prompt.
        num_reused: the number of tokens that it does not compute, wherever their KV was kept.
        num_shared: the number of tokens that it shares with a history that is kept: the nearest of
            its session, or of all if its session has none.
        num_history: the number of tokens in that history; 0 where none is kept.
        is_own: whether that history is of the same session.
        slack: the number of tokens at the end of the shared part that are computed again by design.
            A draft head needs one.
        has_points: whether the model can go on at resume points only.
        shape: what the request is made of.
        is_beside: whether it is known to stand beside the history of its session.
    """

    num_prompt: int
    num_reused: int
    num_shared: int = 0
    num_history: int = 0
    is_own: bool = False
    slack: int = 0
    has_points: bool = False
    shape: Shape = Shape.OTHER
    is_beside: bool = False

    @property
    def has_parted(self) -> bool:
        """Whether the prompt and the history differ before either of them ends."""
        return self.num_shared < min(self.num_history, self.num_prompt - 1)


def why_not_more(session: SessionKey, found: Found, book: SessionBook, now_s: float) -> Missed:
    """Why a turn did not reuse more; the caller adds the place of a change in the messages.

    Args:
        session: the session of the turn.
        found: what the lookup of the turn found.
        book: the stories, before this turn is added.
        now_s: the engine's clock.
    """
    story = book.story(session)
    most = found.num_prompt - 1
    has_tools = story is not None and story.shape is Shape.TOOLS
    if found.is_beside or (found.shape is Shape.BARE and has_tools):
        return Missed(Cause.SIDE_REQUEST)
    if _is_first(story, found):
        return Missed(_cause_of_first(session, book))
    frontier = max(0 if story is None else story.frontier, found.num_history * found.is_own)
    num_missed = max(0, min(frontier, most) - found.num_reused - found.slack)
    behind = max(0, found.num_shared - found.slack - found.num_reused) if found.has_points else 0
    if found.has_parted and found.is_own:
        return Missed(Cause.CHANGED, num_missed, found.num_shared, num_behind_snapshot=behind)
    if not num_missed:
        return Missed()
    is_whole = found.num_shared >= frontier
    if behind and is_whole:
        return Missed(Cause.SNAPSHOT_MISSING, num_missed, num_behind_snapshot=behind)
    if story is not None and story.gone is not None:
        return _evicted(story, num_missed, now_s)
    if found.has_points:
        return Missed(Cause.SNAPSHOT_MISSING, num_missed, num_behind_snapshot=behind)
    return Missed(Cause.EVICTED, num_missed, why_gone=NOT_KEPT)


def _is_first(story: Story | None, found: Found) -> bool:
    """Whether the session has no history yet; requests on the side may have come before it."""
    if story is None:
        return not found.is_own
    return story.shape is Shape.BARE and found.shape is Shape.TOOLS


def _evicted(story: Story, num_missed: int, now_s: float) -> Missed:
    gone = story.gone
    assert gone is not None
    return Missed(
        Cause.EVICTED,
        num_missed,
        why_gone=str(gone.why),
        gone_s=max(0.0, now_s - gone.at_s),
        idle_s=max(0.0, gone.at_s - story.used_s),
    )


def _cause_of_first(session: SessionKey, book: SessionBook) -> Cause:
    """The cause of a first turn: another identity with this session id, if there is one."""
    mine = session.identity
    others = [each for each in book.identities(session.session_id) if each != mine]
    of_tenant = [each for each in others if each.tenant == mine.tenant]
    if any(each.cache_salt == mine.cache_salt for each in of_tenant):
        return Cause.OTHER_LORA
    if of_tenant:
        return Cause.OTHER_SALT
    return Cause.OTHER_TENANT if others else Cause.NEVER_SEEN
