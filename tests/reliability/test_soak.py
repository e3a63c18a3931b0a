# SPDX-License-Identifier: Apache-2.0
"""A short soak: mixed and hostile load, answers as stock vLLM's, and nothing held at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.models import tiny

pytest.importorskip("vllm", reason="vLLM is not installed")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not (tiny.DEFAULT / "config.json").exists(), reason="run `make model`"),
]

SECONDS = 30.0


def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    from benchmarks.reliability.soak import soak
    from benchmarks.reliability.soak_servers import Options

    report = soak(seconds=SECONDS, seed=0, folder=tmp_path, options=Options())
    print(report.markdown())
    assert report.wrong == []
    assert report.stuck == []
    assert report.left == {}
    assert report.problems == {}
    assert report.bad_entries == []
    assert report.counts["requests"] > 50
    assert report.counts["compared"] > 5
