# SPDX-License-Identifier: Apache-2.0
"""What a new turn can reuse, and from whom."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_stateful.prefix.boundaries import ANSWERS, Kind
from vllm_stateful.prefix.edits import QUESTIONS, end_of_question, is_found_in, last_question
from vllm_stateful.prefix.groups.table import ResumePoint
from vllm_stateful.prefix.radix_tree import Known, PrefixMatch, RadixTree
from vllm_stateful.prefix.residency import Match, PromptBase, Residency, is_anonymous
from vllm_stateful.prefix.residency_book import ResidencyBook
from vllm_stateful.types import Outcome, SessionKey, TokenArray

MIN_SHARED_TOKENS = 16
"""A shorter common prefix (a template's opening) is no fork: copying a block costs more."""

MAX_CANDIDATES = 32
"""Residencies whose resume points are looked at for one turn."""


class Matching(ResidencyBook):
    """Finds the residency that a turn continues. Changes nothing."""

    def match(
        self, session: SessionKey, tokens: TokenArray, limit: int, base: PromptBase | None = None
    ) -> Match:
        """Find what a turn can reuse.

        Args:
            session: its identity must equal that of the residency; its id is a hint that
                breaks ties. An anonymous id is replaced by that of the session it continues, or
                whose last answer came back changed.
            tokens: the prompt, shape ``[num_tokens]``.
            limit: most tokens that may be reused (vLLM must compute at least the last one).
            base: what is known of the prompt's beginning; it is not compared again.
        """
        tree = self._trees.get(session.identity)
        if tree is None:
            return Match(session, Outcome.COLD, None, 0)
        longest = tree.match(tokens[:limit], self._known(session, base))
        num_tokens, found = longest.num_tokens, longest.value
        if found is None or num_tokens < min(MIN_SHARED_TOKENS, found.frontier, limit):
            return Match(session, Outcome.COLD, None, 0)
        own = self._own_branch(session, tree, longest)
        if own is not None:
            found, num_tokens = own, min(own.frontier, num_tokens)
        if self._is_next_of_unnamed(session, longest, found, num_tokens, tokens):
            session = found.session
        if self.has_points:
            return self._at_a_point(session, tree, longest, found, num_tokens)
        match = self._classify(session, found, num_tokens, limit)
        return match._replace(related=found, num_shared=num_tokens)

    def is_continued(self, residency: Residency, num_shared: int, prompt: TokenArray) -> bool:
        """Whether a prompt continues the conversation of a history, from which it parts.

        It does if it holds the history's whole prompt, parts from it in the answer, and asks
        something more. It does as well if an answer stands where the history's last question was:
        agents add a reminder to the end of each prompt, and leave it out of the next.

        Args:
            residency: the history.
            num_shared: the tokens before the first difference.
            prompt: shape ``[num_tokens]``.
        """
        if self._rules is None or not residency.alive:
            return False
        question = last_question(residency.tree.path_up(residency), residency.num_asked)
        if question is None or num_shared < question.start:
            return False
        is_asked = num_shared >= question.end
        start = question.end if is_asked else question.start
        before = self.kind_at(residency, start - 1) if start else Kind.OTHER
        cuts = self._rules.cuts(prompt, start, before)
        if not len(cuts.starts) or cuts.starts[0] != start or int(cuts.kinds[0]) not in ANSWERS:
            return False
        return any(int(kind) in QUESTIONS for kind in cuts.kinds[1:])

    def _is_next_of_unnamed(
        self,
        session: SessionKey,
        longest: PrefixMatch[Residency],
        found: Residency,
        num_shared: int,
        prompt: TokenArray,
    ) -> bool:
        """Whether a turn that no client named is the next turn of another such conversation.

        That one must wait for it, and must be the only one that shares these tokens.
        """
        if not is_anonymous(session) or not is_anonymous(found.session) or not found.is_idle:
            return False
        if self.waits.wait_of(found.session) is None:
            return False
        assert longest.node is not None
        for count, other in enumerate(RadixTree.values_below(longest.node)):
            if other.session != found.session and is_anonymous(other.session):
                return False
            if count >= MAX_CANDIDATES:
                return False
        return self.is_continued(found, num_shared, prompt)

    def is_asked_again(self, residency: Residency, num_shared: int, prompt: TokenArray) -> bool:
        """Whether a prompt still has the last question of a history from which it parts.

        Args:
            residency: the history.
            num_shared: the tokens before the first difference.
            prompt: shape ``[num_tokens]``.
        """
        if not residency.alive:
            return False
        path_up, num_asked = residency.tree.path_up(residency), residency.num_asked
        question = end_of_question(path_up, num_asked, num_shared)
        return question is not None and is_found_in(question, prompt[num_shared:])

    def nearest_own(self, session: SessionKey, tokens: TokenArray) -> tuple[Residency, int] | None:
        """The session's own branch that shares most tokens with a prompt, and how many.

        For people, where ``match`` found too little to use.
        """
        tree = self._trees.get(session.identity)
        branches = self.branches(session)
        if tree is None or not branches:
            return None
        longest = tree.match(tokens)
        if longest.node is None:
            return branches[-1], 0
        shared = [(tree.num_shared(branch, longest.node), branch) for branch in branches]
        num_shared, branch = max(shared, key=lambda each: each[0])
        return branch, min(num_shared, longest.num_tokens)

    def _at_a_point(
        self,
        session: SessionKey,
        tree: RadixTree[Residency],
        longest: PrefixMatch[Residency],
        related: Residency,
        num_shared: int,
    ) -> Match:
        """The last resume point in the shared tokens; the session's own if several are equal."""
        best: tuple[Residency, ResumePoint] | None = None
        for residency, most in self._candidates(session, tree, longest):
            point = residency.point_at(most)
            if point is not None and (best is None or point.position > best[1].position):
                best = residency, point
        if best is None:
            return Match(session, Outcome.COLD, None, 0, None, related, num_shared)
        found, point = best
        match = self._classify(session, found, point.position, found.frontier)
        return match._replace(point=point, related=related, num_shared=num_shared)

    def _candidates(
        self, session: SessionKey, tree: RadixTree[Residency], longest: PrefixMatch[Residency]
    ) -> Iterator[tuple[Residency, int]]:
        """Residencies that may be continued, each with the number of shared tokens.

        The session's own come first, then the nearest in the tree.
        """
        node = longest.node
        assert node is not None
        seen: set[int] = set()
        for branch in self.branches(session):
            seen.add(id(branch))
            shared = min(tree.num_shared(branch, node), longest.num_tokens)
            yield branch, shared
        while node.parent is not None and len(seen) < MAX_CANDIDATES:
            for residency in tree.values_below(node):
                if len(seen) >= MAX_CANDIDATES:
                    return
                if id(residency) not in seen:
                    seen.add(id(residency))
                    yield residency, min(node.end, longest.num_tokens, residency.frontier)
            node = node.parent

    def _known(self, session: SessionKey, base: PromptBase | None) -> Known[Residency] | None:
        """The residency of the earlier prompt, if it still exists and has the same identity."""
        found = None if base is None else self._of_version.get(base.version)
        if base is None or found is None or found.session.identity != session.identity:
            return None
        return Known(found, min(base.num_tokens, found.frontier))

    def _own_branch(
        self, session: SessionKey, tree: RadixTree[Residency], longest: PrefixMatch[Residency]
    ) -> Residency | None:
        """The session's own branch, unless another session's saves a whole block more.

        A fork computes its parent's last sampled token first, so it often matches one token
        further; that is no reason to leave one's own session.
        """
        assert longest.node is not None
        least = longest.num_tokens - self.block_size + 1

        def order(branch: Residency) -> tuple[int, int]:
            """Branches with most shared tokens first; of equals the shortest."""
            return -min(branch.frontier, longest.num_tokens), branch.frontier

        for branch in sorted(self.branches(session), key=order):
            if branch.frontier < least:
                continue
            shared = min(branch.frontier, longest.num_tokens)
            if tree.num_shared(branch, longest.node) >= shared:
                return branch
        return None

    @staticmethod
    def _classify(session: SessionKey, found: Residency, num_tokens: int, limit: int) -> Match:
        whole = num_tokens == min(found.frontier, limit)
        if whole and is_anonymous(session) and is_anonymous(found.session):
            session = found.session
        if session != found.session:
            return Match(session, Outcome.FORKED, found, num_tokens)
        outcome = Outcome.RESUMED if whole else Outcome.DIVERGED
        return Match(session, outcome, found, num_tokens)
