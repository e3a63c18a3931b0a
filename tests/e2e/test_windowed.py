# SPDX-License-Identifier: Apache-2.0
"""Sliding windows with `--disable-hybrid-kv-cache-manager`: one group, kept whole, so resumed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import windowed
from forked import with_vllm

pytestmark = pytest.mark.e2e

SIDES = {
    "stock": {},
    "plugin": {
        "VLLM_STATEFUL": "1",
        "VLLM_STATEFUL_STRICT": "1",
        "VLLM_STATEFUL_CHECK_INVARIANTS": "1",
    },
}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("windowed")
    common = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

    def play(side: str) -> list[Any]:
        out = folder / f"{side}.json"
        with_vllm().run(Path(windowed.__file__), out, **common, **SIDES[side])
        return list(json.loads(out.read_text()))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SIDES, pool.map(play, SIDES), strict=True))


def test_answers_are_those_of_stock(played: dict[str, list[Any]]) -> None:
    stock, plugin = ([said for _, said in played[side]] for side in SIDES)
    assert plugin == stock


def test_a_turn_computes_what_is_new_in_it(played: dict[str, list[Any]]) -> None:
    computed = [num for num, _ in played["plugin"]][windowed.SESSIONS :]
    edited = computed.pop(windowed.SESSIONS + 1)
    assert set(computed) == {windowed.ADDED + 1}
    length = windowed.FIRST + 3 * windowed.ADDED + 2 * windowed.ANSWER
    assert edited == length - 300
