# SPDX-License-Identifier: Apache-2.0
"""What is counted of each turn, and what travels to the API server."""

import json

import pytest

from vllm_stateful.observe.metrics import METRICS, RESUME_BUCKETS_S, Metric
from vllm_stateful.observe.turn_counts import MAX_RECENT_LATENCIES, TurnCounts
from vllm_stateful.types import Bypass, Demotion, Outcome


def test_a_fresh_snapshot_is_zero() -> None:
    assert TurnCounts().snapshot({}) == {
        "turns": {},
        "edits": {},
        "bypasses": {},
        "demotions": {},
        "num_tokens_reused": 0,
        "num_tokens_computed": 0,
        "resume_latencies_s": [],
    }


def test_admitted_turns_split_their_prompt_into_reused_and_computed() -> None:
    counts = TurnCounts()
    counts.admitted(Outcome.COLD, 0, 100)
    counts.admitted(Outcome.RESUMED, 90, 110)
    counts.admitted(Outcome.RESUMED, 120, 121)
    snapshot = counts.snapshot({})
    assert snapshot["turns"] == {"cold": 1, "resumed": 2}
    assert snapshot["num_tokens_reused"] == 210
    assert snapshot["num_tokens_computed"] == 121


def test_a_bypassed_turn_counts_once_as_turn_and_once_by_reason() -> None:
    counts = TurnCounts()
    counts.bypassed(Bypass.MULTIMODAL)
    counts.bypassed(Bypass.MULTIMODAL)
    counts.bypassed(Bypass.PROMPT_LOGPROBS)
    snapshot = counts.snapshot({})
    assert snapshot["turns"] == {"bypassed": 3}
    assert snapshot["bypasses"] == {"multimodal": 2, "prompt_logprobs": 1}
    assert snapshot["num_tokens_computed"] == 0


def test_totals_stay_and_latencies_are_taken_out() -> None:
    counts = TurnCounts()
    counts.admitted(Outcome.FORKED, 5, 9)
    counts.resumed_after(0.25)
    counts.resumed_after(0.5)
    assert counts.snapshot({})["resume_latencies_s"] == [0.25, 0.5]
    again = counts.snapshot({})
    assert again["resume_latencies_s"] == []
    assert again["turns"] == {"forked": 1}


def test_a_snapshot_is_a_copy() -> None:
    counts = TurnCounts()
    counts.admitted(Outcome.COLD, 0, 1)
    snapshot = counts.snapshot({})
    counts.admitted(Outcome.COLD, 0, 1)
    assert snapshot["turns"] == {"cold": 1}


def test_latencies_that_nobody_reads_stay_bounded_and_recent() -> None:
    counts = TurnCounts()
    for number in range(MAX_RECENT_LATENCIES + 10):
        counts.resumed_after(float(number))
    latencies = counts.snapshot({})["resume_latencies_s"]
    assert len(latencies) == MAX_RECENT_LATENCIES
    assert latencies[-1] == MAX_RECENT_LATENCIES + 9


def test_a_snapshot_is_plain_data_with_plain_string_keys() -> None:
    counts = TurnCounts()
    counts.admitted(Outcome.RESUMED, 1, 2)
    counts.bypassed(Bypass.POOLING)
    snapshot = counts.snapshot(dict.fromkeys(Demotion, 1))
    assert json.loads(json.dumps(snapshot)) == snapshot
    for label in ("turns", "bypasses", "demotions"):
        assert {type(key) for key in snapshot[label]} == {str}
    assert snapshot["demotions"] == {str(why): 1 for why in Demotion}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_each_metric_has_a_unit_free_of_suffixes_that_prometheus_adds(metric: Metric) -> None:
    assert metric.name.startswith("vllm_stateful_")
    assert not metric.name.endswith("_total")
    assert metric.kind in {"counter", "gauge", "histogram"}
    assert metric.process in {"api", "engine"}
    assert metric.help.endswith(".")


def test_names_and_keys_are_unique_and_buckets_rise() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert len({metric.key for metric in METRICS}) == len(METRICS)
    assert list(RESUME_BUCKETS_S) == sorted(set(RESUME_BUCKETS_S))


def test_each_outcome_is_named_in_the_help_of_the_turns_metric() -> None:
    (turns,) = (metric for metric in METRICS if metric.key == "turns")
    assert all(outcome in turns.help for outcome in Outcome)
