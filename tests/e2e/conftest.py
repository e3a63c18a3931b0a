# SPDX-License-Identifier: Apache-2.0
"""Real models through real vLLM. `make model` builds the models; without them the tests skip."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from forked import with_vllm
from local_models import ROOT, TINY

pytest.importorskip("vllm", reason="vLLM is not installed")

Played = dict[str, Any]


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Played]:
    """Runs tests/e2e/play.py in a process of its own; the same call runs once per session."""
    folder = tmp_path_factory.mktemp("played")
    done: dict[tuple[str, ...], Played] = {}

    def run(model: Path, *arguments: str) -> Played:
        if not (model / "config.json").exists():
            pytest.skip(f"{model.name} is not built: run `make model`")
        key = (model.name, *arguments)
        if key not in done:
            out = folder / f"{len(done)}.json"
            program = ROOT / "tests" / "e2e" / "play.py"
            with_vllm().run(program, "--model", model, "--out", out, *arguments)
            done[key] = json.loads(out.read_text())
        return done[key]

    return run


@pytest.fixture(scope="session")
def recorded(play: Callable[..., Played], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with the prompts that stock vLLM saw in the main scenario, tiny model."""
    path = tmp_path_factory.mktemp("recorded") / "stock.json"
    path.write_text(json.dumps(play(TINY)))
    return str(path)


@pytest.fixture(scope="module")
def collector() -> Iterator[Any]:
    """Takes the spans that a server sends; without OpenTelemetry its tests skip."""
    from collector import Collector

    made = Collector()
    yield made
    made.shutdown()
    made.server_close()
