# SPDX-License-Identifier: Apache-2.0
"""An engine ends and another one starts: KV comes back from files, or is computed."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import with_vllm
from local_models import ROOT, TINY
from restarted import BLOCK, MAX_TOKENS
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not (TINY / "config.json").exists(), reason="run `make model`"),
]

PROGRAM = ROOT / "tests" / "e2e" / "restarted.py"
ALICE, BOB, NOBODY = "salt-of-alice", "salt-of-bob", "salt-of-nobody"
NUM_FIRST, NUM_MORE = 200, 40

Answer = dict[str, Any]


def prompt_of(session: int, num_tokens: int) -> list[int]:
    draw = random.Random(session)
    return [draw.randrange(100, 5000) for _ in range(num_tokens)]


def first(session: int, salt: str = ALICE) -> dict[str, Any]:
    return {"salt": salt, "prompt": prompt_of(session, NUM_FIRST)}


def second(session: int, salt: str = ALICE, cut: list[str] | None = None) -> dict[str, Any]:
    """The session's next turn, with files to cut before it is asked."""
    return {"salt": salt, "prompt": prompt_of(session, NUM_FIRST + NUM_MORE), "cut": cut or []}


class Engines:
    """Engines one after the other, with the same files and the same folder of the model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"
        self.model = folder / "model"
        shutil.copytree(TINY, self.model)

    def run(self, *asked: dict[str, Any]) -> list[Answer]:
        """Start one, ask, and end it."""
        (self.folder / "in.json").write_text(json.dumps(asked))
        files = (self.files, self.folder / "in.json", self.folder / "out.json")
        with_vllm().run(PROGRAM, self.model, *files, PYTHONPATH=str(ROOT))
        return list(json.loads((self.folder / "out.json").read_text()))

    def change_weights(self) -> None:
        """New weights of the same shape, with the same name."""
        path = self.model / "model.safetensors"
        weights = load_file(path)
        save_file({name: -tensor for name, tensor in weights.items()}, path)

    def blocks(self) -> list[Path]:
        return list(self.files.rglob("*.bin"))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("restart"))


@pytest.fixture(scope="module")
def before(engines: Engines) -> list[Answer]:
    """Of the first engine: four first turns, and what is right for the second ones."""
    right = [second(session, NOBODY) for session in range(4)]
    return engines.run(*(first(session) for session in range(4)), *right)


WHOLE = NUM_FIRST // BLOCK * BLOCK


def test_only_what_is_new_is_computed_after_a_restart_and_a_broken_file_only_costs_time(
    engines: Engines, before: list[Answer]
) -> None:
    turns, right = before[:4], [answer["answer"] for answer in before[4:]]
    assert all(len(answer["answer"]) == MAX_TOKENS for answer in before)
    assert [answer["cached"] for answer in before] == [0] * 8
    assert [len(turn["new"]) for turn in turns] == [(NUM_FIRST + MAX_TOKENS - 1) // BLOCK] * 4
    (size,) = {path.stat().st_size for path in engines.blocks()}
    for path in turns[2]["new"]:
        os.truncate(path, size // 2)  # while no engine runs
    begun = Path(turns[2]["new"][0] + "_1.tmp")
    begun.write_bytes(b"begun")
    os.utime(begun, (0, 0))
    whole, other, cut_before, cut_later = engines.run(
        second(0),
        second(0, BOB),
        second(2),
        second(3, cut=turns[3]["new"][:1]),
    )
    assert [whole["answer"], whole["cached"]] == [right[0], WHOLE]
    assert [other["answer"], other["cached"]] == [right[0], 0]
    assert [cut_before["answer"], cut_before["cached"]] == [right[2], 0]
    assert cut_later["answer"] == right[3]
    assert cut_later["cached"] < WHOLE
    assert {path.stat().st_size for path in engines.blocks()} == {size}
    assert not begun.exists()


def test_new_weights_do_not_read_the_kv_of_the_old_ones(
    engines: Engines, before: list[Answer]
) -> None:
    engines.change_weights()
    found, right = engines.run(second(1), second(1, NOBODY))
    assert (found["cached"], right["cached"]) == (0, 0)
    assert found["answer"] == right["answer"] != before[5]["answer"]
    old, new = engines.files.iterdir()
    assert {old.stat().st_mode & 0o777, new.stat().st_mode & 0o777} == {0o700}
    told = [json.loads((folder / "served.json").read_text())["model"] for folder in (old, new)]
    assert told[0]["weights"] != told[1]["weights"]
    assert told[0]["config"] == told[1]["config"]
