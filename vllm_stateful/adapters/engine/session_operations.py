# SPDX-License-Identifier: Apache-2.0
"""What an engine core answers the API server about its sessions, their turns and its totals.

A client learns only of sessions with its own API key and salt: the API server says under which salt
it asks. The operator's key asks under all salts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from vllm_stateful.adapters.attention_choice import STEPS
from vllm_stateful.prefix.pins import PinLedger
from vllm_stateful.prefix.residency import Residency
from vllm_stateful.schedule.gaps import WaitKind
from vllm_stateful.session import Cause, Story, TurnRecord, client_id, name_of
from vllm_stateful.transport.wire import CLOSE, ENDED, SESSION, SESSIONS, STATS, TURN, TURNS
from vllm_stateful.types import SessionKey

MAX_LISTED = 200
"""The most entries of one answer. An answer is made between two steps."""


class SessionOperations:
    """Answers about one scheduler.

    Args:
        scheduler: a stateful scheduler (`scheduler`).
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._manager = scheduler.kv_cache_manager

    def answer(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer one question.

        Raises:
            ValueError: no such operation.
        """
        if self._scheduler.stateful_off is not None:
            return {"off": self._scheduler.stateful_off}
        operations: dict[str, Callable[..., dict[str, Any]]] = {
            STATS: self.stats,
            CLOSE: self.close,
            SESSIONS: self.sessions,
            SESSION: self.session,
            TURNS: self.turns,
            TURN: self.turn,
            ENDED: self.ended,
        }
        if operation not in operations:
            raise ValueError(f"stateful: no operation {operation!r}")
        return operations[operation](**arguments)

    # ---- totals --------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """All totals that the metrics show."""
        manager, prefills = self._manager, self._scheduler.prefills
        store = manager.store
        return {
            **manager.turn_counts.snapshot(store.demotions),
            "waits": {str(kind): number for kind, number in store.waits.num_began.items()},
            "num_answers_unread": getattr(manager.called_tool, "num_failed", 0),
            "num_prefills_joined": 0 if prefills is None else prefills.groups.num_joined,
            "num_reasoning_dropped": store.num_reasoning_dropped,
            "resume_points": manager.resume_points.counts(),
            **self._tier_stats(),
            **self._draft_stats(),
            "attention_steps": dict(STEPS),
            "num_sessions": store.num_sessions,
            "num_blocks_pinned": store.pins.num_pinned,
            "num_blocks_budget": store.pins.budget_blocks,
            "num_blocks_free": manager.block_pool.get_num_free_blocks(),
            "num_blocks_total": manager.block_pool.num_gpu_blocks - 1,
        }

    def _tier_stats(self) -> dict[str, float]:
        tier = self._scheduler.tier
        if tier is None:
            return {"num_offloads_declined": 0, "offload_working_set": 0.0}
        return {
            "num_offloads_declined": tier.num_declined,
            "offload_working_set": tier.working_set.ratio,
        }

    def _draft_stats(self) -> dict[str, int]:
        scheduler = self._scheduler
        speculation = scheduler.engine_drafts
        drafts = scheduler.device_drafts if speculation is None else speculation.drafts
        return {
            "num_tokens_drafted": 0 if drafts is None else drafts.num_drafted,
            "num_drafts_accepted": 0 if drafts is None else drafts.num_accepted,
        }

    # ---- close ---------------------------------------------------------------------------

    def close(self, session_ids: list[str], cache_salt: str | None) -> dict[str, int]:
        """Close the sessions with these ids, under one salt and any adapter."""
        scheduler, manager = self._scheduler, self._manager
        for request in scheduler.requests.values():
            if request.session_id in session_ids:
                manager.turn_of(request)  # so that one not looked up yet counts, too
        if scheduler.engine_drafts is not None:
            scheduler.engine_drafts.closed(
                lambda session: (
                    session.session_id in session_ids and session.identity.cache_salt == cache_salt
                )
            )
        closed = (manager.close_session(each, cache_salt) for each in session_ids)
        return {"closed": sum(closed)}

    # ---- sessions and turns --------------------------------------------------------------

    def sessions(
        self, cache_salt: str | None, *, sees_all: bool = False, limit: int = 100, skip: int = 0
    ) -> dict[str, Any]:
        """The sessions, the one with the newest turn first; and the pool, with ``sees_all``."""
        stories = self._stories(cache_salt, sees_all=sees_all)
        listed = islice(stories, skip, skip + min(limit, MAX_LISTED))
        told = {"sessions": [self._told(story, sees_all=sees_all) for story in listed]}
        return {**told, "pool": self._pool()} if sees_all else told

    def _pool(self) -> dict[str, int]:
        """The number of blocks: in all, free, and kept only by waiting sessions."""
        pool, pins = self._manager.block_pool, self._manager.store.pins
        return {
            "total": pool.num_gpu_blocks - 1,
            "free": pool.get_num_free_blocks(),
            "kept": pins.num_freeable,
        }

    def session(
        self, session_ids: list[str], cache_salt: str | None, *, sees_all: bool = False
    ) -> dict[str, Any]:
        """What is known of the sessions of these ids, one entry for each LoRA adapter."""
        stories = self._stories(cache_salt, sees_all=sees_all)
        meant = [story for story in stories if _is_named(story.session, session_ids)]
        told = []
        for story in meant:
            place = self._place_of(story, sees_all)
            told.append({**self._told(story, sees_all=sees_all), "eviction_place": place})
        return {"sessions": told}

    def _place_of(self, story: Story, sees_all: bool) -> int | None:
        if story.num_running:
            return None
        place: int | None = self._manager.store.place_of(story.session, counts_all=sees_all)
        return place

    def turns(
        self,
        cache_salt: str | None,
        session_ids: list[str] | None = None,
        *,
        sees_all: bool = False,
        limit: int = 100,
    ) -> dict[str, Any]:
        """The turns of some sessions, or of all, the newest first."""
        records = self._records(cache_salt, sees_all=sees_all)
        meant = (
            record
            for record in records
            if session_ids is None or _is_named(record.session, session_ids)
        )
        listed = islice(meant, min(limit, MAX_LISTED))
        return {"turns": [_shown(record, sees_all=sees_all) for record in listed]}

    def turn(
        self, request_id: str, cache_salt: str | None, *, sees_all: bool = False
    ) -> dict[str, Any]:
        """One turn, by the id of its request as the client or the engine knows it."""
        records = self._manager.records
        if records is None:
            return {"turns": []}
        log = records.log
        record = log.find_of_anybody(request_id) if sees_all else log.find(request_id, cache_salt)
        if record is None or not _is_told(record.session, cache_salt, sees_all=sees_all):
            return {"turns": []}
        return {"turns": [_shown(record, sees_all=sees_all)]}

    def ended(self) -> dict[str, Any]:
        """The turns that have ended since this was asked last, as their clients may see them."""
        records = self._manager.records
        taken = [] if records is None else records.take_ended()
        return {
            "ended": [
                {
                    "turn": {
                        **_shown(each.record, sees_all=False),
                        "client_id": client_id(each.record),
                    },
                    "at": each.at,
                    "headers": each.headers,
                }
                for each in taken
            ]
        }

    def _stories(self, cache_salt: str | None, *, sees_all: bool) -> Iterator[Story]:
        records = self._manager.records
        stories = iter(()) if records is None else records.book.newest_first()
        return (s for s in stories if _is_told(s.session, cache_salt, sees_all=sees_all))

    def _records(self, cache_salt: str | None, *, sees_all: bool) -> Iterator[TurnRecord]:
        records = self._manager.records
        found = iter(()) if records is None else records.log.newest_first()
        return (r for r in found if _is_told(r.session, cache_salt, sees_all=sees_all))

    def _told(self, story: Story, *, sees_all: bool) -> dict[str, Any]:
        store, now_s = self._manager.store, self._manager.store.now_s()
        branches = store.branches(story.session)
        waits = store.waits.wait_of(story.session)
        lora = story.session.identity.lora
        return {
            "session_id": story.session.session_id,
            "session": name_of(story.session),
            "tenant": story.session.identity.tenant,
            "lora": None if lora is None else str(lora[0]),
            "state": _state(story, waits),
            "waits_for": None if waits is None or story.num_running else waits[0].tool or None,
            "turns": story.num_turns,
            "running": story.num_running,
            "age_s": now_s - story.since_s,
            "idle_s": now_s - story.used_s,
            "tokens": max((branch.frontier for branch in branches), default=0),
            "blocks": sum(branch.num_blocks for branch in branches),
            "own_blocks": _own_blocks(branches, store.pins) if sees_all else None,
            "branches": len(branches),
            "resume_points": sum(len(branch.points) for branch in branches),
            "returns": max((branch.forecast.returns for branch in branches), default=None),
            "parent": None if story.parent is None else story.parent.session_id,
            "children": [child.session_id for child in story.children],
            "demoted": None if story.gone is None else str(story.gone.why),
            "last_turn": None if story.last is None else _shown(story.last, sees_all=sees_all),
        }


def _is_told(session: SessionKey, cache_salt: str | None, *, sees_all: bool) -> bool:
    """Whether a caller that asks under a salt may know of a session."""
    return sees_all or session.identity.cache_salt == cache_salt


def _is_named(session: SessionKey, session_ids: list[str]) -> bool:
    return session.session_id in session_ids


def _own_blocks(branches: tuple[Residency, ...], pins: PinLedger) -> int:
    """The number of blocks that only the idle ones of these branches of a session hold.

    The scheduler waits for this. So the usual case, one branch without points, sorts nothing.
    """
    held = [branch.block_ids for branch in branches if branch.is_idle]
    held += [point.ids for branch in branches if branch.is_idle for point in branch.points]
    if not held:
        return 0
    ids, counts = held[0], np.ones(1, np.int64)
    if len(held) > 1:
        ids, counts = np.unique(np.concatenate(held), return_counts=True)
    is_own = (pins.holders_of_all[ids] == counts) & (pins.users_of_all[ids] == 0)
    return int(np.count_nonzero(is_own))


def _shown(record: TurnRecord, *, sees_all: bool) -> dict[str, Any]:
    """A record as a dictionary, without what only the operator may know."""
    shown = record.as_dict()
    if not sees_all and record.missed.cause in (Cause.OTHER_TENANT, Cause.OTHER_SALT):
        shown["missed"] = {**shown["missed"], "cause": str(Cause.NEVER_SEEN)}
    return shown


def _state(story: Story, waits: tuple[Any, float] | None) -> str:
    if story.num_running > 0:
        return "running"
    if waits is None:
        return "closed"
    kind = waits[0].kind
    return {WaitKind.TOOL: "waits_for_tool", WaitKind.USER: "waits_for_user"}.get(kind, "one_shot")
