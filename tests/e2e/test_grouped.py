# SPDX-License-Identifier: Apache-2.0
"""Windows, states and draft heads through real vLLM: answers of stock, and what a turn computes.

And beside vLLM's offload tier, from which sessions come back that the KV cache has lost.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grouped
import pytest
from forked import with_vllm

pytestmark = pytest.mark.e2e

CASES = {
    "sliding windows": ("gemma3", 0),
    "states": ("nemotronh", 0),
    "short convolutions": ("lfm2", 0),
    "a draft head": ("llama", 2),
}
PLUGIN = {
    "VLLM_STATEFUL": "1",
    "VLLM_STATEFUL_STRICT": "1",
    "VLLM_STATEFUL_CHECK_INVARIANTS": "1",
}
COMMON = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


def both(
    folder: Path, family: str, num_drafts: int, num_blocks: int = 0
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """What stock vLLM played, without drafts, and what the plugin did."""

    def play(side: str) -> dict[str, list[Any]]:
        out = folder / f"{side}.json"
        head, more = (num_drafts, PLUGIN) if side == "plugin" else (0, {})
        with_vllm().run(Path(grouped.__file__), family, head, out, num_blocks, **COMMON, **more)
        return dict(json.loads(out.read_text()))

    with ThreadPoolExecutor(2) as pool:
        stock, plugin = pool.map(play, ("stock", "plugin"))
    return stock, plugin


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, list[Any]], dict[str, list[Any]], bool]:
    """What stock vLLM played without drafts, what the plugin did, and whether with a head."""
    family, num_drafts = CASES[request.param]
    return *both(tmp_path_factory.mktemp("grouped"), family, num_drafts), bool(num_drafts)


def test_answers_are_those_of_stock(
    case: tuple[dict[str, list[Any]], dict[str, list[Any]], bool],
) -> None:
    stock, plugin, _ = case
    for name in stock:
        assert [said for _, said in plugin[name]] == [said for _, said in stock[name]], name


def test_a_turn_computes_what_is_new_in_it(
    case: tuple[dict[str, list[Any]], dict[str, list[Any]], bool],
) -> None:
    _, plugin, has_head = case
    computed = {name: [num for num, _ in turns] for name, turns in plugin.items()}
    assert computed["appended"][1:] == [grouped.ADDED + 1] * 3
    changed = grouped.ADDED + grouped.ANSWER // 2 + has_head  # a head's token must be the same
    assert computed["stripped"][1:] == [changed] * 3


def test_the_third_that_begins_alike_starts_where_two_have_parted(
    case: tuple[dict[str, list[Any]], dict[str, list[Any]], bool],
) -> None:
    _, plugin, has_head = case
    assert plugin["third-one"][0][0] <= grouped.OWN + grouped.ADDED + has_head + 16


@pytest.mark.parametrize(
    ("family", "num_drafts", "num_blocks"),
    [("gemma3", 0, 160), ("lfm2", 0, 48), ("llama", 2, 48)],
    ids=["sliding windows", "states", "a draft head"],
)
def test_sessions_come_back_from_the_offload_tier(
    tmp_path: Path, family: str, num_drafts: int, num_blocks: int
) -> None:
    stock, plugin = both(tmp_path, family, num_drafts, num_blocks)
    (num_restored,) = plugin.pop("restored")
    assert num_restored > len(stock)
    for name in stock:
        assert [said for _, said in plugin[name]] == [said for _, said in stock[name]], name
        most = grouped.ADDED + grouped.ANSWER + grouped.BLOCK_SIZE * 2
        assert all(computed <= most for computed, _ in plugin[name][1:]), name
