# SPDX-License-Identifier: Apache-2.0
"""`--stateful-attention` and vLLM's registry of backends."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_stateful.adapters import attention_choice
from vllm_stateful.adapters.attention_choice import BACKEND, choose_attention

FLASH = AttentionBackendEnum.FLASH_ATTN
STOCK = FLASH.value


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    FLASH.clear_override()
    yield
    FLASH.clear_override()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "LIBRARY", Path(__file__))


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attention_choice, "LIBRARY", tmp_path / "none.so")


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("choice", ["auto", "on"])
def test_it_takes_the_place_and_gives_it_back(choice: str) -> None:
    problems: list[str] = []
    choose_attention(choice, problems.append)
    choose_attention(choice, problems.append)
    assert FLASH.get_path() == BACKEND
    choose_attention("off", problems.append)
    assert FLASH.get_path() == STOCK
    assert not problems


@pytest.mark.usefixtures("not_built")
def test_without_kernels_only_on_is_a_problem() -> None:
    problems: list[str] = []
    choose_attention("off", problems.append)
    choose_attention("auto", problems.append)
    assert not problems
    choose_attention("on", problems.append)
    assert "not built" in problems[0]
    assert FLASH.get_path() == STOCK


@pytest.mark.usefixtures("built")
def test_the_backend_of_another_plugin_stays() -> None:
    register_backend(FLASH, "another.Backend")
    problems: list[str] = []
    choose_attention("on", problems.append)
    choose_attention("off", problems.append)
    assert FLASH.get_path() == "another.Backend"
    assert problems == ["FLASH_ATTN is another.Backend"]
