# SPDX-License-Identifier: Apache-2.0
"""What an API process counts of its prompts."""

import json

from vllm_stateful.observe.diagnosis_counts import DiagnosisCounts
from vllm_stateful.observe.hint_counts import HintCounts
from vllm_stateful.observe.metrics import METRICS
from vllm_stateful.observe.prompt_counts import PromptCounts, Sent, Tokenized, Verified
from vllm_stateful.observe.response_counts import ResponseCounts
from vllm_stateful.observe.tool_call_counts import ToolCallCounts


def test_a_fresh_snapshot_names_every_label_at_zero() -> None:
    snapshot = PromptCounts().snapshot()
    assert snapshot["prompts_tokenized"] == dict.fromkeys(map(str, Tokenized), 0)
    assert snapshot["prompts_verified"] == {"equal": 0, "different": 0}
    assert snapshot["prompts_sent"] == {"delta": 0, "full": 0, "resent": 0}
    assert snapshot["num_tokens_tokenized"] == {"reused": 0, "new": 0}
    assert snapshot["answers"] == {}
    assert snapshot["render_bytes"] == 0


def test_the_tokens_of_a_prompt_split_into_reused_and_new() -> None:
    counts = PromptCounts()
    counts.tokenized(Tokenized.FULL, 100)
    counts.tokenized(Tokenized.INCREMENTAL, 150, 90)
    counts.tokenized(Tokenized.SHORT)
    snapshot = counts.snapshot()
    tokenized = {how: n for how, n in snapshot["prompts_tokenized"].items() if n}
    assert tokenized == {"incremental": 1, "full": 1, "short": 1}
    assert snapshot["num_tokens_tokenized"] == {"reused": 90, "new": 160}


def test_each_event_counts_once_under_its_label() -> None:
    counts = PromptCounts()
    for how in (Sent.FULL, Sent.DELTA, Sent.DELTA, Sent.RESENT):
        counts.sent(how)
    for result in (Verified.EQUAL, Verified.EQUAL, Verified.DIFFERENT):
        counts.verified(result)
    for answer in ("kept", "different", "kept"):
        counts.answered(answer)
    snapshot = counts.snapshot()
    assert snapshot["prompts_sent"] == {"delta": 2, "full": 1, "resent": 1}
    assert snapshot["prompts_verified"] == {"equal": 2, "different": 1}
    assert snapshot["answers"] == {"kept": 2, "different": 1}


def test_memory_is_read_when_it_is_asked_for() -> None:
    counts, sizes = PromptCounts(), [5, 7]
    counts.watch_memory(lambda: sizes.pop(0))
    assert [counts.snapshot()["render_bytes"] for _ in range(2)] == [5, 7]


def test_a_snapshot_is_a_copy_of_plain_data() -> None:
    counts = PromptCounts()
    snapshot = counts.snapshot()
    counts.tokenized(Tokenized.FULL, 10)
    counts.sent(Sent.FULL)
    counts.answered("kept")
    assert snapshot == PromptCounts().snapshot()
    assert json.loads(json.dumps(snapshot)) == snapshot
    for labels in (value for value in snapshot.values() if isinstance(value, dict)):
        assert all(type(label) is str for label in labels)


def test_the_snapshot_feeds_exactly_the_metrics_of_the_api_process() -> None:
    own = {metric.key for metric in METRICS if metric.process == "api"}
    all_counts = (PromptCounts, ResponseCounts, ToolCallCounts, DiagnosisCounts, HintCounts)
    snapshots = [counts().snapshot() for counts in all_counts]
    assert {key for snapshot in snapshots for key in snapshot} == own


def test_the_help_of_a_labelled_metric_names_its_labels() -> None:
    snapshot = PromptCounts().snapshot()
    for metric in METRICS:
        if metric.key in snapshot and metric.label is not None:
            assert all(label in metric.help for label in snapshot[metric.key]), metric.name
