# SPDX-License-Identifier: Apache-2.0
"""Turns with pictures and sounds through real vLLM: answers of stock, computed is what is new."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
import shown
import tiny_vision
from forked import with_vllm
from live_server import LiveServer
from shown import ANSWER, CHUNK, SYSTEM, asks, picture

pytestmark = pytest.mark.e2e

SMALL_CHUNKS = {
    "max_num_batched_tokens": CHUNK,
    "max_num_seqs": 4,
    "block_size": 32,
    "mm_processor_cache_gb": 0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pictures": ("idefics3", {}),
    "pictures in small chunks": ("idefics3", SMALL_CHUNKS),
    "sounds": ("qwen2_audio", {}),
    "pictures beside windows": ("gemma3", {}),
    "positions in three parts": ("qwen2_5_vl", {}),
}
NEEDS_TORCHVISION = {"gemma3", "qwen2_5_vl"}
TOKENS = {"idefics3": 39, "qwen2_audio": 50, "gemma3": 36, "qwen2_5_vl": 37}
"""Of what is shown: the least that is computed again when something else is."""
BEHIND = len("That is all.") + len("\nassistant\n") + 2
"""Tokens of a question behind what it shows, with two that are special."""
PLUGIN = {
    "VLLM_STATEFUL": "1",
    "VLLM_STATEFUL_STRICT": "1",
    "VLLM_STATEFUL_CHECK_INVARIANTS": "1",
}
COMMON = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

Turns = dict[str, list[list[Any]]]


class Case(NamedTuple):
    """What both sides played: by conversation and turn, prompt, computed tokens and answer."""

    family: str
    stock: Turns
    plugin: Turns


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a model."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def build(family: str) -> Path:
        if family in NEEDS_TORCHVISION and importlib.util.find_spec("torchvision") is None:
            pytest.skip("vLLM's code of this model needs torchvision")
        with_vllm().run(Path(tiny_vision.__file__), family, folder / family)
        return folder / family

    return build


@pytest.fixture(scope="module")
def play(
    built: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    """Plays a case, once."""
    folder = tmp_path_factory.mktemp("shown")

    @cache
    def play(name: str) -> Case:
        family, options = CASES[name]
        model = built(family)

        def side(which: str, more: dict[str, str]) -> Turns:
            out = folder / f"{name}-{which}.json"
            program = Path(shown.__file__)
            with_vllm().run(program, model, out, json.dumps(options), **COMMON, **more)
            return dict(json.loads(out.read_text()))

        with ThreadPoolExecutor(2) as pool:
            stock, plugin = pool.map(side, ("stock", "plugin"), ({}, PLUGIN))
        return Case(family, stock, plugin)

    return play


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, play: Callable[[str], Case]) -> Case:
    return play(request.param)


def test_answers_are_those_of_stock(case: Case) -> None:
    for name, turns in case.stock.items():
        assert [said for *_, said in case.plugin[name]] == [said for *_, said in turns], name


def test_a_turn_computes_what_is_new_in_it(case: Case) -> None:
    turns = case.plugin["one"]
    for before, turn in pairwise(turns):
        assert turn[1] == turn[0] - (before[0] + ANSWER - 1)


def test_what_is_shown_is_part_of_the_history(case: Case) -> None:
    if "other" not in case.plugin:
        pytest.skip("not played in small chunks")
    assert case.stock["one"][2][2] != case.stock["other"][2][2]
    other = TOKENS[case.family] + BEHIND
    if case.family == "gemma3":  # it starts at an earlier resume point
        assert case.plugin["other"][2][1] >= other
    else:
        assert case.plugin["other"][2][1] == other


def test_swapped_pictures_are_another_history(play: Callable[[str], Case]) -> None:
    case = play("pictures")
    assert case.stock["pair"][0][2] != case.stock["swapped"][0][2]
    assert case.plugin["swapped"][0][1] == 2 * TOKENS[case.family] + BEHIND
    assert case.plugin["swapped"][0][:2] == case.plugin["pair"][0][:2]


def test_a_picture_that_is_only_named_is_the_one_that_was_sent(
    play: Callable[[str], Case],
) -> None:
    case = play("pictures")
    assert [turn[2] for turn in case.plugin["named-only"]] == [
        turn[2] for turn in case.plugin["named"]
    ]
    assert [turn[1] for turn in case.plugin["named-only"]] == [1, 1, 1]


def test_a_turn_goes_on_inside_a_picture(play: Callable[[str], Case]) -> None:
    case = play("pictures in small chunks")
    places, inside = [], 0
    for name, ((num, computed, _), *_) in case.plugin.items():
        if name.startswith("cut"):
            places.append(num - computed)
            end = num - BEHIND
            inside += end - TOKENS[case.family] < places[-1] < end
    assert places == [CHUNK * count for count in range(6, 6 + len(places))]
    assert inside >= 2


# ---- over HTTP ---------------------------------------------------------------------------


class Client:
    """OpenAI's client of a server with the plugin."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, messages: list[Any], tenant: str, **options: Any) -> list[Any]:
        """Tokens of the prompt, those computed, and the answer."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=tenant, max_retries=0)
        response = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=ANSWER, temperature=0, **options
        )
        usage: Any = response.usage
        num, cached = usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0
        return [num, num - cached, response.choices[0].message.content]

    def play(self, questions: list[Any], tenant: str, **options: Any) -> list[list[Any]]:
        history, turns = [SYSTEM], []
        for question in questions:
            history.append(question)
            turns.append(self.ask(history, tenant, **options))
            history.append({"role": "assistant", "content": turns[-1][2]})
        return turns


@pytest.fixture(scope="module")
def client(
    built: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    options = ["--plugin", "stateful", "--stateful-check-invariants", "--stateful-strict"]
    options += ["--served-model-name", "tiny", "--max-model-len", "4096"]
    with LiveServer(built("idefics3"), log, *options) as live:
        yield Client(live.url)
        assert live.process.poll() is None, live.last_words()


@pytest.mark.parametrize("headers", [{"X-Session-ID": "session-of-pictures"}, {}])
def test_a_client_resumes_behind_a_screenshot(
    client: Client, play: Callable[[str], Case], headers: dict[str, str]
) -> None:
    turns = client.play(shown.ONE, f"resumes {headers}", extra_headers=headers)
    expected = play("pictures")
    assert [turn[2] for turn in turns] == [turn[2] for turn in expected.stock["one"]]
    assert [turn[1] for turn in turns] == [turn[1] for turn in expected.plugin["one"]]


def test_tenants_do_not_share_what_they_see(client: Client) -> None:
    question = [SYSTEM, asks(1, picture(21))]
    named = {"extra_headers": {"X-Session-ID": "session-of-tenants"}}
    first = client.ask(question, "sees one", **named)
    salted = client.ask(question, "sees one", extra_body={"cache_salt": "grain"}, **named)
    other = client.ask(question, "sees two", **named)
    assert first == salted == other
    assert first[0] == first[1]
    assert client.ask(question, "sees one", **named)[1] == 1


def test_a_name_of_a_picture_is_its_tenants(client: Client) -> None:
    def sees(tenant: str, *shows: Any, **options: Any) -> str:
        return str(client.ask([SYSTEM, asks(1, picture(*shows))], tenant, **options)[2])

    salted = {"extra_body": {"cache_salt": "grain"}}
    answers = [sees("names none", seed) for seed in (31, 32, 33)]
    assert len(set(answers)) == 3
    assert sees("names one", 31, "the-screenshot") == answers[0]
    assert sees("names two", 32, "the-screenshot") == answers[1]
    assert sees("names two", 33, "the-screenshot", **salted) == answers[2]
    assert sees("names one", None, "the-screenshot") == answers[0]
    with pytest.raises(openai.APIStatusError):
        sees("names three", None, "the-screenshot")
