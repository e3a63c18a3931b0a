# SPDX-License-Identifier: Apache-2.0
"""Hypothesis: any order of turns, forks, edits, aborts, closes and resets, in a pool too small.

`lifecycle` has the machine. Here it is played over each kind of KV cache group, with drafts, beside
KV connectors, and with one or two steps in flight.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine
from lifecycle import AgentSessions
from simulated_lmcache import lmcache
from simulated_tier import offloading

from vllm_stateful.prefix import matching, resume_places
from vllm_stateful.speculate.step_costs import StepCosts


class AgentSessionsAsync(AgentSessions):
    """The same with two steps in flight, as on CUDA."""

    async_scheduling = True


@pytest.fixture(autouse=True)
def _tiny_sessions_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "MIN_SHARED_TOKENS", 2)
    monkeypatch.setattr(resume_places, "MIN_SAVED", 4)
    monkeypatch.setattr(StepCosts, "least_chance", lambda *_: 0.0)


class AgentSessionsWithDrafts(AgentSessions):
    """The same with prompt-lookup drafts, of which about half are rejected."""

    num_drafts = 3


class AgentSessionsWithOwnDrafts(AgentSessions):
    """The same with drafts from the sessions, whatever they are worth."""

    num_drafts = 5
    session_drafts = True


class AgentSessionsDraftsBesideHead(AgentSessions):
    """A draft head, and drafts from the sessions beside it."""

    kinds = ("head", "full", "window")
    num_blocks = 60
    num_drafts = 3
    session_drafts = beside_head = True


class AgentSessionsOffloaded(AgentSessions):
    """The same beside vLLM's offload tier, which holds about two conversations."""

    connectors = (offloading(30),)


class AgentSessionsOffloadedAsync(AgentSessionsOffloaded):
    """The same with two steps in flight: vLLM frees blocks a step later then."""

    async_scheduling = True


class AgentSessionsLMCache(AgentSessions):
    """The same beside LMCache, of which a load may fail: chunks of three blocks, in the step."""

    connectors = (lmcache(10, fails=True),)


class AgentSessionsLMCacheAsync(AgentSessionsLMCache):
    """The same with two steps in flight, and lookups that take a step. vLLM has no right answer
    then to a load that fails: it reads what the step behind has sampled.
    """

    async_scheduling = True
    connectors = (lmcache(10, is_slow=True, overwrites=False),)


class AgentSessionsLMCacheDrafts(AgentSessionsLMCache):
    """The same with drafts, of which about half are rejected."""

    num_drafts = 3


class AgentSessionsSeveral(AgentSessions):
    """The same beside three connectors at once."""

    connectors = (offloading(20), lmcache(8, fails=True), offloading(20, "lru"))


class AgentSessionsSeveralAsync(AgentSessionsSeveral):
    """The same with two steps in flight."""

    async_scheduling = True
    connectors = (lmcache(8), offloading(20), offloading(20, "lru"))


class AgentSessionsWindows(AgentSessions):
    """Sliding windows beside full attention (Gemma, gpt-oss)."""

    kinds = ("window", "full", "window")
    has_markers = True
    num_blocks = 60


class AgentSessionsChunksAsync(AgentSessionsAsync):
    """Local chunks beside full attention (Llama 4), with two steps in flight."""

    kinds = ("chunk", "full")
    has_markers = True
    num_blocks = 60


class AgentSessionsStates(AgentSessions):
    """States beside full attention (Qwen3-Next, Nemotron-H)."""

    kinds = ("state", "state", "full")
    has_markers = True
    num_blocks = 60


class AgentSessionsStatesAsync(AgentSessionsStates):
    """The same with two steps in flight: a state is then behind the last token."""

    async_scheduling = True


class AgentSessionsAllKinds(AgentSessionsAsync):
    """Every kind at once."""

    kinds = ("state", "window", "chunk", "full")
    has_markers = True
    num_blocks = 70


class AgentSessionsUnequal(AgentSessions):
    """Blocks of several sizes (Gemma 4)."""

    kinds = ("window*2", "full", "window")
    num_blocks = 60


class AgentSessionsUnits(AgentSessionsAsync):
    """States whose blocks are longer than what is hashed (``--prefix-match-unit``)."""

    kinds = ("state*2", "state*2", "full*2")
    has_markers = True


class AgentSessionsHead(AgentSessions):
    """A draft head, whose KV depends on the token behind."""

    kinds = ("head", "full", "window")
    has_markers = True
    num_blocks = 60


class AgentSessionsStatesDrafts(AgentSessionsStates):
    """States beside drafts, with one step at a time: few ends of turns can be continued."""

    num_drafts = 3
    block_size = 8


class AgentSessionsStatesDraftsAsync(AgentSessionsStates):
    """States beside drafts of the worker's own (MTP on CUDA); a fifth of all tokens is a stop."""

    async_scheduling = True
    num_drafts = 3
    stops = tuple(range(0, 100, 5))
    block_size = 8


class AgentSessionsAllKindsDrafts(AgentSessionsStatesDraftsAsync):
    """Every kind at once, beside drafts and a head."""

    kinds = ("state", "window", "head", "chunk", "full")
    num_drafts = 2
    num_blocks = 70


class AgentSessionsWindowsOffloaded(AgentSessionsWindows):
    """Sliding windows beside vLLM's offload tier."""

    connectors = (offloading(60),)


class AgentSessionsStatesOffloaded(AgentSessionsStates):
    """States beside vLLM's offload tier, which stores those at block ends."""

    connectors = (offloading(60),)


class AgentSessionsStatesOffloadedAsync(AgentSessionsStatesOffloaded):
    """The same with two steps in flight."""

    async_scheduling = True


class AgentSessionsAllKindsOffloaded(AgentSessionsAllKinds):
    """Every kind at once beside two tiers."""

    connectors = (offloading(50), offloading(50, "lru"))


class AgentSessionsUnitsOffloaded(AgentSessionsUnits):
    """States whose blocks are longer than what is hashed: vLLM stores parts of blocks, too."""

    connectors = (offloading(60),)


class AgentSessionsHeadOffloaded(AgentSessionsHead):
    """A draft head beside vLLM's offload tier."""

    connectors = (offloading(60),)


class AgentSessionsAllKindsDraftsOffloaded(AgentSessionsAllKindsDrafts):
    """Every kind, drafts and a head beside vLLM's offload tier."""

    connectors = (offloading(60),)


RUN = settings(
    max_examples=int(os.environ.get("STATEFUL_EXAMPLES", "100")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes here
)


@pytest.mark.parametrize(
    "machine",
    [
        AgentSessions,
        AgentSessionsAsync,
        AgentSessionsWithDrafts,
        AgentSessionsWithOwnDrafts,
        AgentSessionsDraftsBesideHead,
        AgentSessionsOffloaded,
        AgentSessionsOffloadedAsync,
        AgentSessionsLMCache,
        AgentSessionsLMCacheAsync,
        AgentSessionsLMCacheDrafts,
        AgentSessionsSeveral,
        AgentSessionsSeveralAsync,
        AgentSessionsWindows,
        AgentSessionsChunksAsync,
        AgentSessionsStates,
        AgentSessionsStatesAsync,
        AgentSessionsAllKinds,
        AgentSessionsUnequal,
        AgentSessionsUnits,
        AgentSessionsHead,
        AgentSessionsStatesDrafts,
        AgentSessionsStatesDraftsAsync,
        AgentSessionsAllKindsDrafts,
        AgentSessionsWindowsOffloaded,
        AgentSessionsStatesOffloaded,
        AgentSessionsStatesOffloadedAsync,
        AgentSessionsAllKindsOffloaded,
        AgentSessionsUnitsOffloaded,
        AgentSessionsHeadOffloaded,
        AgentSessionsAllKindsDraftsOffloaded,
    ],
)
def test_any_order_of_events(machine: type[RuleBasedStateMachine]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine, settings=RUN)
