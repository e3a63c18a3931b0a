# SPDX-License-Identifier: Apache-2.0
"""The command of the paper's workloads, on this machine and on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serving import bench_agents
from benchmarks.serving.servers import NGRAM, PLUGIN, STOCK, serve_command


def command(side: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    settings = bench_agents.settings(bench_agents.parse(arguments))
    return serve_command(Path("model"), 1, side, settings), dict(settings.environment)


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


@pytest.mark.parametrize("side", [STOCK, NGRAM, PLUGIN])
def test_equal_answers_are_asked_for_on_a_cpu(side: str) -> None:
    arguments, environment = command(side)
    assert option(arguments, "--dtype") == "float32"
    assert "--load-format" not in arguments
    assert "VLLM_USE_V2_MODEL_RUNNER" not in environment


@pytest.mark.parametrize("side", [STOCK, NGRAM, PLUGIN])
@pytest.mark.parametrize("mode", ["replay", "live"])
def test_servers_share_a_gpu(side: str, mode: str) -> None:
    arguments, environment = command(side, "--model", "llama-8b", "--modes", mode)
    assert option(arguments, "--dtype") == "bfloat16"
    assert option(arguments, "--load-format") == "dummy"
    assert option(arguments, "--gpu-memory-utilization") == "0.30"
    assert "--enforce-eager" not in arguments
    assert (environment.get("VLLM_USE_V2_MODEL_RUNNER") == "0") == (mode == "replay")
    assert (side == PLUGIN) == ("--plugin" in arguments)


@pytest.mark.parametrize(
    ("mode", "method"), [("replay", "ngram"), ("live", "ngram_gpu"), ("replay,live", "ngram")]
)
def test_ngram_is_that_of_the_model_runner(mode: str, method: str) -> None:
    arguments, _ = command(NGRAM, "--model", "llama-8b", "--modes", mode)
    assert json.loads(option(arguments, "--speculative-config"))["method"] == method


@pytest.mark.parametrize(("mode", "method"), [("replay", "custom_class"), ("live", "ngram_gpu")])
def test_the_plugin_drafts_where_the_model_runner_does(mode: str, method: str) -> None:
    arguments, _ = command(PLUGIN, "--model", "llama-8b", "--modes", mode)
    assert json.loads(option(arguments, "--speculative-config"))["method"] == method
