# SPDX-License-Identifier: Apache-2.0
"""Takes resume points while a turn is computed: holds windows, and copies states.

A chunk of the prompt is made to end at the place (``stop``), so that the state there exists. Before
the next tokens are computed (``capture``), the blocks of the last window are held, and the state's
block is copied. The copy is made like the copies that vLLM makes of blocks before it writes to
them. In an answer the place is a marker that was sampled (``read_answer``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.request import Request

from vllm_stateful.adapters.engine.turn import Turn
from vllm_stateful.prefix import resume_places
from vllm_stateful.prefix.boundaries import BoundaryRules, Cuts, Kind
from vllm_stateful.prefix.groups import Group, ResumePoint, Table
from vllm_stateful.prefix.residency import Match, Residency
from vllm_stateful.prefix.resume_places import Place


class ResumePoints:
    """Takes the resume points of one scheduler's running turns.

    Args:
        coordinator: vLLM's coordinator, with the managers of all groups.
        groups: one group for each manager.
        rules: where messages begin; None when that is not known.
        make_room: frees a number of blocks. False when it cannot.
        lookahead: the number of tokens behind a point that must be the same (``Group.lookahead``).
    """

    def __init__(
        self,
        coordinator: Any,
        groups: Sequence[Group],
        rules: BoundaryRules | None,
        make_room: Callable[[int], bool],
        lookahead: int = 0,
    ) -> None:
        self._managers = coordinator.single_type_managers
        self._pool = coordinator.block_pool
        self._groups = groups
        self._rules = rules
        self._make_room = make_room
        self._lookahead = lookahead
        self._num_states = sum(group.is_state for group in groups)
        self._markers = frozenset[int]() if rules is None else rules.marker_ids
        self.knows_markers = rules is not None
        self.num_taken = 0
        self.num_missed = 0
        """Points that were not taken because no block was free, or because their blocks were
        gone."""

    def counts(self) -> dict[str, int]:
        """The number of points wanted inside prompts and answers, by result."""
        return {"taken": self.num_taken, "missed": self.num_missed}

    def plan(self, turn: Turn, match: Match, start: int, before: Kind) -> None:
        """Decide where a turn leaves resume points; decide anew when the turn is looked up again.

        Args:
            turn: the turn. Its prompt is read from ``start`` on.
            match: what its lookup found, with the residency that shares most tokens with it.
            start: the position at which it continues.
            before: the kind of the segment that holds the token before ``start``.
        """
        if turn.planned_for == (start, match.num_shared):
            return
        turn.planned_for = (start, match.num_shared)
        cuts = Cuts.none()
        if self._rules is not None:
            cuts = self._rules.cuts(turn.prompt, start, before)
        is_fork = match.related is not None and match.related.session != turn.session
        places = resume_places.resume_places(
            cuts, start, len(turn.prompt), match.num_shared, is_fork=is_fork, before=before
        )
        ahead = self._lookahead
        turn.wanted = [
            place._replace(position=place.position - ahead)
            for place in places
            if place.position - ahead > start
        ]

    @staticmethod
    def stop(turn: Turn, start: int, num_new: int) -> int:
        """How many new tokens a chunk may have so that it ends at the next place."""
        for place in turn.wanted:
            if place.position > start:
                return min(num_new, place.position - start)
        return num_new

    def inherit(self, turn: Turn, residency: Residency, position: int) -> None:
        """Let a turn take references on the points up to the position at which it continues."""
        for point in residency.points:
            if point.position > position + self._lookahead:
                break
            self._pool.touch(point.blocks)
            turn.inherited_ids.append(point.ids)
            turn.points.append(replace(point))

    def capture(self, turn: Turn, request_id: str, num_computed: int) -> None:
        """Take the points that a running request has reached; call before it computes more.

        Args:
            turn: the request's turn.
            request_id: the request.
            num_computed: the number of tokens that its states have read; without states, that are
                computed.
        """
        while turn.wanted and turn.wanted[0].position <= num_computed:
            self._take(turn, request_id, turn.wanted.pop(0), num_computed)

    def _take(self, turn: Turn, request_id: str, place: Place, num_computed: int) -> None:
        point = self._capture(request_id, place.position, num_computed)
        if point is None:
            self.num_missed += 1
            return
        point.is_shared, point.is_question = place.is_shared, place.is_question
        point.is_answer = place.is_answer
        turn.points.append(point)
        self.num_taken += 1

    def read_answer(self, turn: Turn, request: Request, num_computed: int) -> None:
        """Take a point where a segment of the answer begins; call before each step of a request.

        Only tokens that no earlier call saw are read. A state is behind all tokens that were
        computed. These include the marker itself if a step in flight reads it.

        Args:
            turn: the request's turn.
            request: the request.
            num_computed: as for `capture`.
        """
        first = max(turn.num_read, request.num_prompt_tokens)
        turn.num_read = request.num_tokens
        tokens = request.all_token_ids
        for place in range(first, turn.num_read):
            if tokens[place] not in self._markers or place > num_computed:
                continue
            position = num_computed if self._num_states else place
            if position <= place + 1 and self._is_wanted(turn, position):
                self._take(turn, request.request_id, Place(position, is_answer=True), num_computed)

    @staticmethod
    def _is_wanted(turn: Turn, position: int) -> bool:
        """Whether the answer has room for a point that is this far behind the last one."""
        inside = [p.position for p in turn.points if p.is_answer and p.position > len(turn.prompt)]
        before = max(inside, default=len(turn.prompt))
        is_far = position >= before + resume_places.MIN_SAVED
        return is_far and len(inside) < resume_places.MOST_IN_ANSWER

    def capture_at_end(self, turn: Turn, request_id: str, num_computed: int) -> None:
        """Take the points that no later step will take, of a turn that has just ended.

        Only windows have such points. A state has gone on, and the turn's end is a point anyway.
        """
        if turn.wanted and not self._num_states:
            self.capture(turn, request_id, num_computed)

    def _capture(self, request_id: str, position: int, num_computed: int) -> ResumePoint | None:
        if self._num_states and position != num_computed:
            return None
        pieces = [self._piece(place, request_id, position) for place in range(len(self._groups))]
        if any(piece is None for piece in pieces):
            return None
        copied = [group.is_state and position % group.block_size != 0 for group in self._groups]
        if not self._make_room(sum(copied)):
            return None
        tables = []
        for place, piece in enumerate(pieces):
            assert piece is not None
            if copied[place]:
                piece = self._copied(place, piece)
            else:
                self._pool.touch(piece.blocks)
            tables.append(piece)
        return ResumePoint(position + self._lookahead, tuple(tables))

    def _piece(self, place: int, request_id: str, position: int) -> Table | None:
        """What one group needs at a position; None when it is not there."""
        group = self._groups[place]
        if group.is_full:
            return Table.empty()
        table = self._managers[place].req_to_blocks.get(request_id, ())
        first, end = group.first(position), group.end(position)
        blocks = list(table[first:end])
        if len(blocks) < end - first or any(block.is_null for block in blocks):
            return None
        return Table.of(blocks, first)

    def _copied(self, place: int, piece: Table) -> Table:
        """A copy of a state, made by the workers before they compute the next tokens."""
        (source,) = piece.blocks
        (copy,) = self._pool.get_new_blocks(1)
        source.ref_cnt += 1  # both are held until the copy is made, as in `_apply_cow`
        copy.ref_cnt += 1
        self._managers[place]._pending_cow_copies.append((source, copy))
        return Table.of([copy], piece.start)
