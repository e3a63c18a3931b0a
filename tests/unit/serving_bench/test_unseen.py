# SPDX-License-Identifier: Apache-2.0
"""Long sessions of recorded sources, and drafts that start from other chances than the shipped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving import bench_unseen
from benchmarks.serving.agents_load import LongSession, long_sessions
from benchmarks.serving.agents_report import Row
from benchmarks.serving.recorded import Conversation
from benchmarks.serving.servers import PLUGIN, STOCK
from benchmarks.speculate import halves, priors
from vllm_stateful.speculate import drafts
from vllm_stateful.speculate.session_drafts import SessionDrafts

TEXT = np.array([1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2], np.int32)


def count(text: str) -> int:
    return len(text.split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def row(name: str, system: str, num_turns: int, words: int) -> str:
        messages = [{"role": "system", "content": system}]
        for turn in range(num_turns):
            messages += [
                {"role": "user", "content": f"{name} {turn}"},
                {"role": "assistant", "content": "word " * words},
            ]
        return json.dumps({"id": name, "tools": None, "messages": messages})

    rows = [row("a", "One.", 3, 9), row("other", "Two.", 3, 5), row("b", "One.", 3, 2)]
    (tmp_path / "text_dev_test.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_conversations_with_the_same_system_message_are_joined(folder: Path) -> None:
    found = long_sessions(folder, "test", count, 1000, num_turns=4)
    (session,) = found
    texts = [step.new_messages[0]["content"] for step in session.conversation.steps]
    assert texts == ["a 1", "a 2", "b 0", "b 1"]
    assert session.num_recorded == 2
    assert session.conversation.name == "a-1"


def test_sessions_share_no_turn_and_the_shortest_is_first(folder: Path) -> None:
    found = long_sessions(folder, "test", count, 1000, num_turns=2)
    assert [each.conversation.name for each in found] == ["a-3", "other-0", "a-0"]
    assert [each.num_tokens for each in found] == sorted(each.num_tokens for each in found)


def test_what_does_not_fit_is_left_out(folder: Path) -> None:
    fewest = long_sessions(folder, "test", count, 1000, num_turns=2)[0].num_tokens
    found = long_sessions(folder, "test", count, fewest + 64 + 8 + 1, num_turns=2)
    assert [each.conversation.name for each in found] == ["a-3"]
    assert not long_sessions(folder, "test", count, fewest + 64 + 8, num_turns=2)


@pytest.mark.parametrize("source", halves.SOURCES)
def test_a_source_is_not_in_its_own_fit(source: str) -> None:
    assert source not in halves.others_of(source)
    assert len(halves.others_of(source)) == len(halves.SOURCES) // 2


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ValueError, match="no source nowhere"):
        halves.others_of("nowhere")


def num_drafted() -> int:
    made = SessionDrafts(1 << 20)
    made.begins("turn", "session", "agent", TEXT)
    return len(made.draft("turn", 0.5))


def test_drafts_start_from_the_chances_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "PRIORS", drafts.PRIORS)  # restored behind the test
    assert num_drafted() > 0
    priors.use(np.zeros(drafts.PRIORS.shape))
    assert num_drafted() == 0
    priors.use(np.ones(drafts.PRIORS.shape))
    assert num_drafted() == drafts.MAX_DRAFT


@pytest.mark.parametrize("chances", [np.zeros(3), np.full(drafts.PRIORS.shape, 1.5)])
def test_what_are_no_priors_is_refused(chances: drafts.Floats) -> None:
    with pytest.raises(ValueError, match="priors"):
        priors.use(chances)


@pytest.mark.parametrize(("priors_of", "said"), [("other-half", "no"), ("shipped", "yes")])
def test_each_session_has_a_row_that_says_what_was_fitted(priors_of: str, said: str) -> None:
    system = {"role": "system", "content": ""}
    session = LongSession("pi-mono", Conversation("pi-7", system, ()), 1, 100)
    time = {STOCK: (2000.0, 3000.0, 4000.0), PLUGIN: (1000.0, 2000.0, 3000.0)}
    both = {STOCK: 1.0, PLUGIN: 2.0}
    sums = {STOCK: 6000.0, PLUGIN: 2000.0}
    row = Row("replay", "pi-7", 35, 0, time, sums, both, both, both)
    cells = bench_unseen.table([row], [session], priors_of).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[1:6]] == ["pi-mono", said, "7", "1", "35"]
    assert "2.00 / 3.00" in bench_unseen.table([row], [session], priors_of)
    assert bench_unseen.summary([row])[0].startswith("stock / plugin, median turn: 2.00 to 2.00")


@pytest.mark.parametrize(
    "arguments",
    [["--sides", "stock"], ["--sessions", "nowhere:1"], ["--model", "llama-8b"]],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench_unseen.parse(arguments)
