# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV cache manager, extended by residencies: resume, share, keep, give back.

Four methods handle a turn's blocks in its whole life. ``get_computed_blocks`` finds what is here
(`kv_lookup`). ``allocate_slots`` takes it, and never fails because of a pin (`kv_admission`).
``free`` keeps it, and ``reset_prefix_cache`` drops it. Everything else is vLLM's own.
"""

from __future__ import annotations

from vllm.v1.request import Request, RequestStatus

from vllm_stateful.adapters.engine.kv_admission import KVAdmission
from vllm_stateful.adapters.engine.turn import (
    Turn,
    expected_seconds,
    forced_tool,
    is_final,
    output_array,
    retention_wish,
)
from vllm_stateful.prefix.groups import ResumePoint
from vllm_stateful.prefix.residency import FinishedTurn
from vllm_stateful.types import Demotion, SessionKey


class StatefulKVCacheManager(KVAdmission):
    """A ``KVCacheManager`` whose finished turns stay resident.

    It is never constructed. ``adapters.engine.scheduler`` turns the manager that the stock
    scheduler built into one (``become_stateful``), so no constructor argument is repeated here.
    """

    # ---- keep it -------------------------------------------------------------------------

    def free(self, request: Request) -> None:
        """Keep a finished turn's blocks with its session; free those of any other request."""
        if not request.is_finished():
            self._free_preempted(request)
            return
        self.bypassed.discard(request.request_id)
        turn = self.turns.pop(request.request_id, None)
        is_loading = self.loads is not None and self.loads.ended(request)
        if turn is not None:
            turn.has_failed |= is_loading
            self._unshare(turn)
        if turn is not None and self._is_worth_keeping(request, turn):
            self._keep(request, turn)
            return
        if turn is not None:
            self._release_points(turn)
            self._lose(request, turn, self._why_not_kept(request, turn))
            self._note_end(request, turn, 0, is_kept=False)
        super().free(request)

    def sampled(self, request_id: str, num_tokens: int) -> None:
        """Record that a step sampled the first token of a request, or several tokens at once."""
        turn = self.turns.get(request_id)
        if turn is not None and turn.record is not None:
            turn.record.sampled(num_tokens, self.store.now_s())

    def verified(self, request_id: str, num_drafted: int) -> None:
        """Record that a step verified drafts of a request."""
        turn = self.turns.get(request_id)
        if turn is not None and turn.record is not None:
            turn.record.num_drafted += num_drafted

    def _note_end(self, request: Request, turn: Turn, frontier: int, *, is_kept: bool) -> None:
        if self.records is not None:
            self.records.ended(request, turn, frontier, is_kept=is_kept)

    def _is_worth_keeping(self, request: Request, turn: Turn) -> bool:
        if is_final(request):
            turn.is_closing = True
            self.store.close(turn.session)
        return not (turn.is_closing or _has_failed(request, turn) or turn.epoch != self.epoch)

    def _why_not_kept(self, request: Request, turn: Turn) -> Demotion:
        if turn.is_closing:
            return Demotion.CLOSED
        return Demotion.ERROR if _has_failed(request, turn) else Demotion.RESET

    def _free_preempted(self, request: Request) -> None:
        self.preempted(request)
        super().free(request)

    def preempted(self, request: Request) -> None:
        """Take a preempted turn's blocks, as stock vLLM does; the turn looks up again later."""
        turn = self.turns.get(request.request_id)
        if self.loads is not None:
            self.loads.ended(request)
        if turn is not None:
            self._unshare(turn)
            self._release_points(turn)
            turn.wanted, turn.planned_for = [], None
            self._lose(request, turn, Demotion.PREEMPTED)
            turn.is_loading = turn.has_failed = False

    def _lose(self, request: Request, turn: Turn, why: Demotion) -> None:
        """Keep nothing of a turn, neither what it borrowed nor what it computed itself.

        While other branches of its session are kept, the next turn may go on behind one of them. So
        its session is told to have lost something only if none is.
        """
        has_kv = not (turn.is_loading or turn.has_failed)
        if (
            self.records is not None
            and has_kv
            and all(each is turn.borrowed for each in self.store.branches(turn.session))
        ):
            self.records.lost(turn, why, self._end_of(request)[0])
        if turn.borrowed is not None:
            self.store.forfeit(turn.borrowed, why)
        turn.borrowed = turn.offer = None

    def _keep(self, request: Request, turn: Turn) -> None:
        """Hand the turn's blocks to a residency, up to the last token that was surely computed.

        Accepted drafts that a stop cut off, and drafts not yet verified when the client went away,
        count as computed but are no tokens of the request: hence the ``min``.
        """
        frontier, has_state = self._end_of(request)
        if frontier > 0:
            num_hashed = min(frontier, request.num_tokens - self.num_hashed_ahead)
            self.cache_blocks(request, num_hashed)  # blocks that accepted drafts filled
        self.resume_points.capture_at_end(turn, request.request_id, frontier)
        known = None if turn.borrowed is None else turn.borrowed.tables
        tables, held = self.request_tables.take(
            request.request_id, frontier, known, has_state=has_state
        )
        if frontier <= 0:
            self._release_points(turn)
            self._note_end(request, turn, 0, is_kept=False)
            return
        num_known = frontier + self.lookahead
        last = None if held is None else ResumePoint(num_known, held)
        points, turn.points = self._points_of(turn, last, num_known), []
        related, num_shared = turn.related or (None, 0)
        tool = forced_tool(request) or self.called_tool(request)
        made = self.store.finish(
            FinishedTurn(
                session=turn.session,
                prompt=turn.prompt,
                output=output_array(request),
                frontier=num_known,
                tables=tables,
                points=points,
                borrowed=turn.borrowed,
                base=related,
                num_base_tokens=num_shared,
                version=turn.version,
                tool=tool,
                expected_s=expected_seconds(request, tool),
                wish_s=retention_wish(request) or 0.0,
                shape=turn.shape,
            )
        )
        is_kept = bool(self.store.branches(turn.session))  # one that it repeated counts as well
        self._note_end(request, turn, num_known, is_kept=is_kept)
        if made is not None and made.num_blocks > self.store.pins.budget_blocks:
            self.store.demote(made, Demotion.BUDGET)  # else all others would go, then this one
        self.store.enforce_budget()
        if turn.record is not None:
            turn.record.is_kept = bool(self.store.branches(turn.session))

    def _end_of(self, request: Request) -> tuple[int, bool]:
        """How many tokens were surely computed, and whether the states have read exactly these.

        If the answer ended with a step in flight, that step read the last token, which is known.
        The token that it sampled is not known.
        """
        most = request.num_tokens - self.lookahead
        settled = min(request.num_computed_tokens - request.num_output_placeholders, most)
        if not self.store.has_points:
            return settled, True
        position = self.running_states.position(request)
        if position is not None and position <= most:
            return position, True
        return settled, False

    def _points_of(self, turn: Turn, last: ResumePoint | None, frontier: int) -> list[ResumePoint]:
        """The resume points that a turn leaves: one for each position, in order.

        Points behind its frontier and points inside earlier answers are released.
        """
        by_position: dict[int, ResumePoint] = {}
        for point in turn.points if last is None else [*turn.points, last]:
            is_old = point.is_answer and point.position <= len(turn.prompt)
            if is_old or point.position > frontier:
                self.store.release_points([point])
                continue
            before = by_position.get(point.position)
            if before is not None:
                self.store.release_points([before])
                point.is_shared |= before.is_shared
                point.is_question |= before.is_question
            by_position[point.position] = point
        return [by_position[position] for position in sorted(by_position)]

    # ---- drop it -------------------------------------------------------------------------

    def reset_prefix_cache(self) -> bool:
        """Drop every residency, then reset as vLLM does; nothing is kept of running turns."""
        self.epoch += 1
        self.store.drop_all()
        return bool(super().reset_prefix_cache())

    def close_session(self, session_id: str, cache_salt: str | None) -> int:
        """Release what a session keeps, and keep nothing of its running turns either.

        Args:
            session_id: the id that the engine was told.
            cache_salt: the salt that the engine was told. Sessions of other tenants stay. The same
                id is closed under all LoRA adapters.

        Returns:
            The number of branches that were dropped, running turns included.
        """

        def is_meant(session: SessionKey) -> bool:
            return session.session_id == session_id and session.identity.cache_salt == cache_salt

        running = [turn for turn in self.turns.values() if is_meant(turn.session)]
        for turn in running:
            turn.is_closing = True
        sessions = [session for session in self.store.sessions() if is_meant(session)]
        return len(running) + sum(self.store.close(session) for session in sessions)

    def new_step_starts(self) -> None:
        """End idle sessions; the scheduler calls this at the start of each step."""
        self.store.expire(self.idle_seconds)
        super().new_step_starts()


def _has_failed(request: Request, turn: Turn) -> bool:
    """Whether its KV may be wrong: an error ended it, or a load failed or had not ended."""
    return request.status == RequestStatus.FINISHED_ERROR or turn.has_failed
