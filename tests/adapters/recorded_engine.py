# SPDX-License-Identifier: Apache-2.0
"""A simulated engine that records its steps, and what the step tests say to it."""

from typing import Any

from simulated_engine import SimulatedEngine, expected_answer
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

from vllm_stateful.adapters.engine.invariants import check_pool
from vllm_stateful.transport.wire import CLOSE_ACTION
from vllm_stateful.types import Identity, SessionKey

HISTORY = list(range(22))
"""22 tokens: with one answer token, 22 computed ones in five full blocks and one half full."""

ALICE, BOB = "session-alice", "session-bob"


class Engine(SimulatedEngine):
    """A simulated engine that records its steps and runs on a clock of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.now = 0.0
        self.manager.store._clock = lambda: self.now
        self.store = self.manager.store
        self.counts = self.manager.turn_counts
        self.outputs: list[SchedulerOutput] = []
        schedule = self.scheduler.schedule

        def recorded(*args: Any, **kwargs: Any) -> SchedulerOutput:
            output = schedule(*args, **kwargs)
            self.outputs.append(output)
            return output

        self.scheduler.schedule = recorded
        self.created = 0
        """``created_cache_tokens`` of the last turn that gave a token."""
        update = self.scheduler.update_from_output

        def noted(*args: Any, **kwargs: Any) -> Any:
            made = update(*args, **kwargs)
            for output in (each for outputs in made.values() for each in outputs.outputs):
                if output.prefill_stats is not None:
                    self.created = output.prefill_stats.num_cache_creation_tokens
            return made

        self.scheduler.update_from_output = noted

    def turn(
        self, request_id: str, prompt: list[int], session_id: str | None = ALICE, **options: Any
    ) -> list[int]:
        """One turn to its end. Returns the whole history after it."""
        options.setdefault("max_tokens", 1)
        self.outputs.clear()
        self.add(request_id, prompt, session_id=session_id, **options)
        self.run()
        answer = self.answer(request_id)
        assert answer == expected_answer(prompt, options["max_tokens"])
        return prompt + answer

    def num_scheduled(self, request_id: str) -> int:
        return sum(output.num_scheduled_tokens.get(request_id, 0) for output in self.outputs)

    @property
    def num_copies(self) -> int:
        return sum(len(output.kv_cache_block_copies or ()) for output in self.outputs)

    def branches(self, session_id: str) -> tuple[Any, ...]:
        return tuple(self.store.branches(SessionKey(Identity(), session_id)))

    def demotions(self) -> dict[str, int]:
        return {str(why): n for why, n in self.store.demotions.items() if n}

    def outcomes(self) -> dict[str, int]:
        return {str(outcome): n for outcome, n in self.counts.outcomes.items()}

    def check_nothing_is_lost(self) -> None:
        for residency in self.store.residencies():
            self.manager.store.close(residency.session)
        counts = check_pool(self.scheduler)
        assert counts["free"] == counts["total"]
        assert not self.manager.turns
        assert not self.manager.bypassed


def closing_hint() -> KvHintsEnvelope:
    return KvHintsEnvelope("test", "hint", [KvHintAction("0", CLOSE_ACTION, "1", {})])
