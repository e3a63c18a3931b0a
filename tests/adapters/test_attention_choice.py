# SPDX-License-Identifier: Apache-2.0
"""`--stateful-attention` and vLLM's registry of backends."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.v1.attention.backends.registry import register_backend

from vllm_stateful.adapters.attention_choice import ON_CPU, ON_CUDA, Place, choose_attention

PLACES = [ON_CPU, ON_CUDA]


@pytest.fixture(params=PLACES, ids=["cpu", "cuda"])
def stock(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Kernels that were built."""
    place: Place = request.param
    place.stock.clear_override()
    yield place._replace(library=Path(__file__))
    place.stock.clear_override()


def test_it_takes_the_place_and_gives_it_back(stock: Place) -> None:
    problems: list[str] = []
    vllms = stock.stock.get_path()
    choose_attention("on", problems.append, stock)
    choose_attention("on", problems.append, stock)
    assert stock.stock.get_path() == stock.backend
    choose_attention("off", problems.append, stock)
    assert stock.stock.get_path() == vllms
    assert not problems


def test_auto_takes_only_what_was_measured(stock: Place) -> None:
    problems: list[str] = []
    vllms = stock.stock.get_path()
    choose_attention("auto", problems.append, stock)
    taken = stock.backend if stock.is_measured else vllms
    assert stock.stock.get_path() == taken
    choose_attention("on", problems.append, stock)
    choose_attention("auto", problems.append, stock)
    assert stock.stock.get_path() == taken
    assert not problems


def test_without_kernels_only_on_is_a_problem(stock: Place, tmp_path: Path) -> None:
    problems: list[str] = []
    vllms = stock.stock.get_path()
    absent = stock._replace(library=tmp_path / "none.so")
    choose_attention("off", problems.append, absent)
    choose_attention("auto", problems.append, absent)
    assert not problems
    choose_attention("on", problems.append, absent)
    assert "not built" in problems[0]
    assert stock.stock.get_path() == vllms


def test_the_backend_of_another_plugin_stays(stock: Place) -> None:
    register_backend(stock.stock, "another.Backend")
    problems: list[str] = []
    choose_attention("on", problems.append, stock)
    choose_attention("off", problems.append, stock)
    assert stock.stock.get_path() == "another.Backend"
    assert problems == [f"{stock.stock.name} is another.Backend"]


def test_this_platform_has_a_place() -> None:
    vllms = ON_CPU.stock.get_path()
    choose_attention("auto", [].append)
    assert ON_CPU.stock.get_path() == (ON_CPU.backend if ON_CPU.library.exists() else vllms)
    choose_attention("off", [].append)
    assert ON_CPU.stock.get_path() == vllms
