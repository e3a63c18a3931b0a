# SPDX-License-Identifier: Apache-2.0
"""Bursts share what they say, and their table shows what was computed more than once."""

import pytest

from benchmarks.serving import bench_burst
from benchmarks.serving import burst_report as report
from benchmarks.serving.burst_load import AT_ONCE, FORKED, Burst, make_burst
from benchmarks.serving.burst_report import Sample
from benchmarks.serving.recorded import Conversation, Step, rendered
from benchmarks.serving.servers import PLUGIN, STOCK

TEXTS = [f"{chr(65 + number)} text. " * 30 for number in range(12)]


def ids(text: str) -> list[int]:
    """One token for each character."""
    return [ord(char) for char in text]


def burst(name: str = "one", num_agents: int = 3) -> Burst:
    steps = tuple(
        Step(({"role": "user", "content": f"question {number}"},), f"answer {number}", False)
        for number in range(9)
    )
    recorded = [Conversation("c", {"role": "system", "content": "System."}, steps)]
    return make_burst(
        name,
        0,
        recorded,
        TEXTS,
        num_prefix_tokens=500,
        num_private_tokens=50,
        num_agents=num_agents,
        ids=ids,
    )


def test_same_name_same_burst_other_name_nothing_shared() -> None:
    assert burst() == burst()
    one, other = (rendered(burst(name).messages(0)) for name in ("one", "two"))
    assert one[:30] != other[:30]


def test_counts_of_a_burst() -> None:
    made = burst()
    prompts = [rendered(made.messages(agent)) for agent in range(3)]
    shared = made.num_shared_tokens
    assert len({prompt[:shared] for prompt in prompts}) == 1
    assert len({prompt[: shared + 1] for prompt in prompts}) > 1
    assert made.num_private_tokens == sum(len(prompt) - shared for prompt in prompts)
    assert made.num_parent_tokens == len(rendered(made.parent) + made.answer) < shared
    assert shared < 500 + 50
    assert made.least_prefill(AT_ONCE) == shared + made.num_private_tokens
    assert made.least_prefill(FORKED) == made.least_prefill(AT_ONCE) - made.num_parent_tokens


def test_too_few_texts() -> None:
    with pytest.raises(ValueError, match="12 sub-agents"):
        burst(num_agents=13)


def sample(side: str, number: int, agent: int, cached: int) -> Sample:
    made = Sample(side, 32, "default", AT_ONCE, f"b{number}", agent, 130)
    made.sent_s, made.ttft_ms, made.total_ms = agent / 10, 100.0 * (agent + 1), 1000.0
    made.num_prompt_tokens, made.num_cached_tokens, made.text = 100, cached, f"text {agent}"
    return made


def test_rows_are_medians_over_bursts() -> None:
    samples = [
        sample(side, number, agent, 0 if agent == 0 else cached)
        for number, (stock, plugin) in enumerate(((64, 70), (64, 70), (0, 70)))
        for side, cached in ((STOCK, stock), (PLUGIN, plugin))
        for agent in (0, 1)
    ]
    samples[-1].text = "other"
    (row,) = report.make_rows(samples)
    assert row.prefill == {STOCK: 136, PLUGIN: 130}
    assert (row.num_bursts, row.least_prefill, row.num_other_answers) == (3, 130, 1)
    assert row.ttft_ms[STOCK] == {"median": 150, "p99": 200}
    assert row.span_ms == {STOCK: 1100, PLUGIN: 1100}
    assert "| 136 " in report.table([row])


def test_failed_requests_are_shown() -> None:
    samples = [sample(STOCK, 1, 0, 0), sample(PLUGIN, 1, 0, 0)]
    samples[1].error = "gone"
    (row,) = report.make_rows(samples)
    assert row.num_failed == 1
    assert report.faults(samples) == ["failed: plugin, block 32, burst b1, agent 0: gone"]
    assert " nan " in report.table([row])


def test_command_line() -> None:
    args = bench_burst.parse(["--block-size", "16,32", "--variants", "forked"])
    assert (args.block_size, args.variants, args.budget) == (("16", "32"), (FORKED,), ("default",))
    with pytest.raises(SystemExit):
        bench_burst.parse(["--variants", "never"])
    with pytest.raises(SystemExit):
        bench_burst.parse(["--prefix-tokens", "9000"])
