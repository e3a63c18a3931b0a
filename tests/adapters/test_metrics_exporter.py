# SPDX-License-Identifier: Apache-2.0
"""Engine totals become Prometheus metrics, across engines and restarts."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from simulated_engine import SimulatedEngine

from vllm_stateful.adapters.frontend.metrics_exporter import MetricsExporter
from vllm_stateful.observe.diagnosis_counts import DiagnosisCounts
from vllm_stateful.observe.hint_counts import HintCounts
from vllm_stateful.observe.metrics import METRICS, OFF, RESUME_BUCKETS_S
from vllm_stateful.observe.prompt_counts import PromptCounts, Sent, Tokenized, Verified
from vllm_stateful.observe.response_counts import ResponseCounts
from vllm_stateful.observe.tool_call_counts import ToolCallCounts
from vllm_stateful.observe.turn_counts import TurnCounts
from vllm_stateful.types import Demotion, Outcome

PREFIX = "vllm_stateful_"


def snapshot(**values: Any) -> dict[str, Any]:
    """What an engine sends, all zero but for ``values``."""
    gauges = {"num_sessions": 0, "num_blocks_pinned": 0, "num_blocks_budget": 0}
    return {
        **TurnCounts().snapshot({}),
        "waits": {},
        "num_reasoning_dropped": 0,
        "resume_points": {},
        "num_answers_unread": 0,
        "num_prefills_joined": 0,
        "num_offloads_declined": 0,
        "num_tokens_drafted": 0,
        "num_drafts_accepted": 0,
        "attention_steps": {},
        "offload_working_set": 0.0,
        **gauges,
        **values,
    }


class Exported:
    """An exporter over a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.exporter = MetricsExporter(self.registry)

    def update(self, *snapshots: dict[str, Any]) -> None:
        self.exporter.update(list(snapshots))

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(PREFIX + name, labels)


@pytest.fixture
def exported() -> Exported:
    return Exported()


def own_snapshot(**values: Any) -> dict[str, Any]:
    """What an API process says of itself, all zero but for ``values``."""
    own = PromptCounts().snapshot() | ResponseCounts().snapshot() | DiagnosisCounts().snapshot()
    return {**own, **ToolCallCounts().snapshot(), **HintCounts().snapshot(), **values}


def test_every_metric_is_registered_under_its_name(exported: Exported) -> None:
    text = generate_latest(exported.registry).decode()
    for metric in METRICS:
        suffix = "_total" if metric.kind == "counter" else ""
        assert f"# TYPE {metric.name}{suffix} {metric.kind}\n" in text


def test_totals_become_increments(exported: Exported) -> None:
    exported.update(snapshot(turns={"cold": 2}, num_tokens_reused=10))
    exported.update(snapshot(turns={"cold": 2, "resumed": 1}, num_tokens_reused=25))
    exported.update(snapshot(turns={"cold": 3, "resumed": 1}, num_tokens_reused=25))
    assert exported.value("turns_total", outcome="cold") == 3
    assert exported.value("turns_total", outcome="resumed") == 1
    assert exported.value("turns_total", outcome="forked") is None
    assert exported.value("prompt_tokens_reused_total") == 25


def test_each_labelled_counter_has_its_own_label(exported: Exported) -> None:
    exported.update(snapshot(bypasses={"multimodal": 4}, demotions={"idle": 5, "reset": 0}))
    exported.update(snapshot(waits={"tool": 2, "user": 0}))
    assert exported.value("waits_total", kind="tool") == 2
    assert exported.value("bypassed_turns_total", reason="multimodal") == 4
    assert exported.value("demotions_total", reason="idle") == 5
    assert exported.value("demotions_total", reason="reset") == 0


def test_an_engine_that_restarted_counts_from_zero_and_nothing_is_subtracted(
    exported: Exported,
) -> None:
    exported.update(snapshot(turns={"cold": 10}, num_tokens_computed=100))
    exported.update(snapshot(turns={"cold": 4}, num_tokens_computed=30))
    exported.update(snapshot(turns={"cold": 5}, num_tokens_computed=30))
    assert exported.value("turns_total", outcome="cold") == 15
    assert exported.value("prompt_tokens_computed_total") == 130


def test_two_engines_add_up_and_one_may_restart_alone(exported: Exported) -> None:
    exported.update(snapshot(num_tokens_reused=10), snapshot(num_tokens_reused=100))
    exported.update(snapshot(num_tokens_reused=3), snapshot(num_tokens_reused=101))
    assert exported.value("prompt_tokens_reused_total") == 114


def test_gauges_are_the_sum_over_engines_now(exported: Exported) -> None:
    exported.update(snapshot(num_sessions=3), snapshot(num_sessions=4))
    assert exported.value("sessions") == 7
    exported.update(snapshot(num_sessions=1), snapshot(num_sessions=0))
    assert exported.value("sessions") == 1


def test_an_engine_that_is_off_counts_nothing_and_keeps_the_others_in_place(
    exported: Exported,
) -> None:
    off = {"off": "prefix caching is off"}
    exported.update(off, snapshot(num_sessions=2, num_tokens_reused=5))
    exported.update(off, snapshot(num_sessions=2, num_tokens_reused=8))
    assert exported.value("sessions") == 2
    assert exported.value("prompt_tokens_reused_total") == 8
    exported.update(off, off)
    assert exported.value("sessions") == 0
    assert exported.value("prompt_tokens_reused_total") == 8


def test_why_engines_are_off_is_a_metric(exported: Exported) -> None:
    exported.update({"off": "a"}, {"off": "a"}, snapshot())
    assert exported.value("engines_off", reason="a") == 2
    exported.update({"off": "b"}, {"off": "a"}, snapshot())
    assert exported.value("engines_off", reason="a") == 1
    assert exported.value("engines_off", reason="b") == 1
    exported.update(snapshot(), snapshot(), snapshot())
    assert exported.value("engines_off", reason="a") == 0


def test_no_engine_at_all_is_no_error(exported: Exported) -> None:
    exported.update()
    assert exported.value("sessions") == 0


def test_each_latency_is_one_observation(exported: Exported) -> None:
    exported.update(snapshot(resume_latencies_s=[0.0002, 0.02]))
    exported.update(snapshot(resume_latencies_s=[5.0]), snapshot(resume_latencies_s=[]))
    assert exported.value("resume_seconds_count") == 3
    assert exported.value("resume_seconds_sum") == pytest.approx(5.0202)
    assert exported.value("resume_seconds_bucket", le="0.00025") == 1
    assert exported.value("resume_seconds_bucket", le=str(RESUME_BUCKETS_S[-1])) == 2
    assert exported.value("resume_seconds_bucket", le="+Inf") == 3


def test_the_engines_own_snapshot_feeds_every_metric(exported: Exported) -> None:
    engine = SimulatedEngine(num_blocks=20)
    history = list(range(21))
    for number, prompt in enumerate([history, [*history, *range(10)]]):
        engine.add(str(number), prompt, session_id="session-one", max_tokens=1)
        engine.run()
    stats = engine.scheduler.stateful("stats", {})
    assert {metric.key for metric in METRICS if metric.process == "engine"} <= {*stats, OFF}
    exported.update(stats)
    assert exported.value("turns_total", outcome=str(Outcome.RESUMED)) == 1
    assert exported.value("prompt_tokens_reused_total") == 21
    assert exported.value("prompt_tokens_computed_total") == 21 + 10
    assert exported.value("sessions") == 1
    assert exported.value("blocks_pinned") == 8
    assert exported.value("blocks_budget") == 9
    assert exported.value("resume_seconds_count") == 1
    for why in Demotion:
        assert exported.value("demotions_total", reason=str(why)) == 0


# ---- the totals of the API process itself ------------------------------------------------------


def test_own_totals_become_increments(exported: Exported) -> None:
    counts = PromptCounts()
    counts.tokenized(Tokenized.FULL, 100)
    exported.exporter.update_own(own_snapshot(**counts.snapshot()))
    counts.tokenized(Tokenized.INCREMENTAL, 130, 90)
    counts.sent(Sent.DELTA)
    counts.verified(Verified.EQUAL)
    counts.watch_memory(lambda: 4096)
    for _ in range(2):
        exported.exporter.update_own(own_snapshot(**counts.snapshot()))
    assert exported.value("prompts_tokenized_total", how="full") == 1
    assert exported.value("prompts_tokenized_total", how="incremental") == 1
    assert exported.value("prompt_tokens_tokenized_total", kind="reused") == 90
    assert exported.value("prompt_tokens_tokenized_total", kind="new") == 140
    assert exported.value("prompts_sent_total", how="delta") == 1
    assert exported.value("prompts_sent_total", how="resent") == 0
    assert exported.value("prompts_verified_total", result="equal") == 1
    assert exported.value("render_bytes") == 4096


def test_own_totals_and_those_of_the_engine_leave_each_other_alone(exported: Exported) -> None:
    exported.exporter.update_own(own_snapshot(render_bytes=7, prompts_sent={"full": 3}))
    exported.update(snapshot(num_sessions=2, num_tokens_reused=5))
    assert exported.value("render_bytes") == 7
    assert exported.value("prompts_sent_total", how="full") == 3
    exported.exporter.update_own(own_snapshot(render_bytes=8, prompts_sent={"full": 4}))
    assert exported.value("sessions") == 2
    assert exported.value("prompt_tokens_reused_total") == 5
    assert exported.value("prompts_sent_total", how="full") == 4


def test_without_an_engine_to_ask_own_totals_are_there(exported: Exported) -> None:
    """Only the first of several API servers asks the engine."""
    exported.exporter.update_own(own_snapshot(prompts_sent={"full": 1}))
    assert exported.value("prompts_sent_total", how="full") == 1
    assert exported.value("prompt_tokens_reused_total") == 0


def test_a_gauge_of_several_api_servers_is_their_sum_and_one_of_the_engine_is_not(
    exported: Exported,
) -> None:
    modes = {
        metric.key: made._multiprocess_mode
        for metric, made in exported.exporter._made.items()
        if metric.kind == "gauge"
    }
    assert modes.pop("render_bytes") == "livesum"
    assert modes.pop("response_cache_bytes") == "livesum"
    assert set(modes.values()) == {"mostrecent"}
