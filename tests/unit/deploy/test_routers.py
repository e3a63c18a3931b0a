# SPDX-License-Identifier: Apache-2.0
"""The routers' files, and how the benchmark reads what came of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.field import router_programs, routers
from benchmarks.field.router_play import Turn
from benchmarks.field.router_programs import FILES, KINDS, Router, missing

HEADER = re.compile(r"x[-_]session[-_]id", re.IGNORECASE)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_has_the_addresses_that_are_replaced(name: str, tmp_path: Path) -> None:
    router = Router(name, (4001, 4002), "tiny", tmp_path)
    made = (tmp_path / f"{name}-{KINDS[name].file}").read_text()
    assert not re.search(r"\b800[0-2]\b|my-model", made.replace("--port 8000`", ""))
    assert "4001" in made
    assert "4002" in made
    assert name == "litellm" or str(router.port) in made


@pytest.mark.parametrize("name", sorted({kind.file for kind in KINDS.values()}))
def test_a_file_names_the_header(name: str) -> None:
    assert HEADER.search((FILES / name).read_text())


@pytest.mark.parametrize("name", ["envoy.yaml", "litellm.yaml"])
def test_a_file_is_yaml(name: str) -> None:
    assert yaml.safe_load((FILES / name).read_text())


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.parametrize("name", ["nginx", "round-robin"])
def test_nginx_takes_its_file(name: str, tmp_path: Path) -> None:
    Router(name, (4001, 4002), "tiny", tmp_path)
    words = ["nginx", "-t", "-c", str(tmp_path / f"{name}-nginx.conf")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_round_robin_is_nginx_without_the_hash(tmp_path: Path) -> None:
    texts = []
    for name in ("nginx", "round-robin"):
        Router(name, (4001, 4002), "tiny", tmp_path)
        lines = (tmp_path / f"{name}-nginx.conf").read_text().splitlines()
        texts.append([line.strip() for line in lines if "listen" not in line and "pid" not in line])
    assert set(texts[0]) - set(texts[1]) == {"hash $session consistent;"}


@pytest.mark.parametrize(
    ("cached", "before", "has_found"),
    [(0, 0, False), (299, 300, True), (320, 300, True), (298, 300, False), (0, 300, False)],
)
def test_a_turn_found_its_session_if_the_prompt_before_was_cached(
    cached: int, before: int, has_found: bool
) -> None:
    assert Turn(400, cached, before, [], None).has_found is has_found


def test_a_router_that_is_not_installed_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_programs.shutil, "which", lambda _: None)
    assert missing("nginx") == "nginx is not on PATH"
    found: dict[str, Any] = {
        "later_turns": 80,
        "found": 40,
        "prompt_tokens": 1000,
        "cached_tokens": 250,
        "errors_after_the_kill": {"status 502": 2},
        "sessions_on_the_killed_replica": 7,
        "cold_turns_after_the_kill": 8,
        "found_in_the_last_turn": 16,
    }
    text = routers.table({"nginx": found, "envoy": {"left_out": "envoy is not on PATH"}})
    assert "| nginx | 40 of 80 (50%) | 25% | 2 × status 502 | 7 | 8 | 16 of 16 |" in text
    assert "| envoy | envoy is not on PATH |" in text
