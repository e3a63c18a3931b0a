# SPDX-License-Identifier: Apache-2.0
"""Turning the plugin on: everything, or nothing and one line that says why."""

import dataclasses
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import envs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_stateful.adapters import activation, fit
from vllm_stateful.adapters.engine import engine_utility
from vllm_stateful.adapters.engine.scheduler import StatefulAsyncScheduler, StatefulScheduler
from vllm_stateful.compat import probe
from vllm_stateful.compat.ledger import PATCHES, patch_of
from vllm_stateful.compat.patch import Patch
from vllm_stateful.config import FEATURES, process_config
from vllm_stateful.errors import ConfigError, UnsupportedError

SESSIONS = {patch.name for patch in PATCHES if patch.feature == "sessions"}
OPT_IN = ("cli", "history", "responses", "tool-call-check", "engine-drafts")
BY_DEFAULT = {p.name for p in PATCHES if p.feature not in OPT_IN}
HOOKS = [hook for patch in PATCHES for hook in patch.calls]

# Runs in a fresh interpreter: the process in which vLLM calls the entry point.
SUBPROCESS = """
import importlib, os, sys
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
from vllm_stateful.compat.ledger import PATCHES, patch_of
from vllm_stateful.plugin import register

def members():
    found = {}
    for patch in PATCHES:
        module, _, path = patch.target.partition(":")
        *owners, name = path.split(".")
        owner = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        found[patch.name] = vars(owner).get(name)
    return found

def loaded():
    return {name for name in sys.modules if name.startswith("vllm_stateful.adapters")}

before = members()
"""


def run_fresh(code: str, **environment: str) -> str:
    """Run ``code`` after SUBPROCESS; returns what it wrote to the log."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_STATEFUL")}
    done = subprocess.run(
        [sys.executable, "-c", SUBPROCESS + code],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_installed_but_not_asked_for_every_symbol_of_vllm_is_the_very_same_object() -> None:
    run_fresh(
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "register()\n"
        "assert all(member is before[name] for name, member in members().items())\n"
        "assert not any(patch.is_applied for patch in PATCHES)\n"
        "assert loaded() == set(), loaded()\n"
        "assert 'vllm_stateful.plugin' in sys.modules\n"
    )


def test_enabled_all_patches_are_applied_once_and_undone_exactly() -> None:
    run_fresh(
        "sys.argv = ['vllm', 'serve', 'model', '--stateful-strict']\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "from vllm_stateful.adapters.speculation import SessionDrafter\n"
        "left = [patch.name for patch in PATCHES if not patch.is_applied]\n"
        "assert left == ['worker-logits', 'worker-sampler'], left\n"
        "SessionDrafter(None)\n"
        "assert all(patch.is_applied for patch in PATCHES)\n"
        "after = members()\n"
        "assert not any(member is before[name] for name, member in after.items())\n"
        "register()\n"
        "assert all(member is after[name] for name, member in members().items())\n"
        "from vllm_stateful.adapters.fit import problems\n"
        "assert problems() == ()\n"
        "from vllm.platforms import current_platform\n"
        "current_platform.validate_environ(hard_fail=True)\n"
        "for patch in PATCHES: patch.undo()\n"
        "assert all(member is before[name] for name, member in members().items())\n",
        VLLM_STATEFUL="1",
        VLLM_STATEFUL_IDLE_SECONDS="60",
        VLLM_STATEFUL_RESPONSE_CACHE_BYTES="1M",
        VLLM_STATEFUL_HISTORY="generated",
        VLLM_STATEFUL_TOOL_CALL_CHECK="end",
    )


# ---- in this process -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _stock_before_and_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No patch, hook or problem is left over, nor a variable of ours."""
    for name in [name for name in os.environ if name.startswith("VLLM_STATEFUL")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(fit, "_problems", [])
    undo_all()
    yield
    undo_all()
    os.environ.pop(fit.OFF_ENV, None)


def undo_all() -> None:
    for patch in PATCHES:
        patch.undo()
    for hook in HOOKS:
        hook.clear()


class Lines(logging.Handler):
    """The log lines of the plugin, from warnings up."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    handler = Lines()
    monkeypatch.setattr(activation.logger, "level", logging.WARNING)
    activation.logger.manager._clear_cache()  # type: ignore[attr-defined]
    activation.logger.addHandler(handler)
    yield handler.texts
    activation.logger.removeHandler(handler)
    activation.logger.manager._clear_cache()  # type: ignore[attr-defined]


def applied() -> set[str]:
    return {patch.name for patch in PATCHES if patch.is_applied}


def drift(monkeypatch: pytest.MonkeyPatch, *drifted: Patch) -> None:
    """As if vLLM had added an argument to the targets of these patches."""
    changed = [
        dataclasses.replace(patch, signature="(self, something_else)")
        if patch in drifted
        else patch
        for patch in PATCHES
    ]
    monkeypatch.setattr(activation, "PATCHES", tuple(changed))


def test_activate_applies_all_but_the_command_line_without_a_word(lines: list[str]) -> None:
    activation.activate()
    assert applied() == BY_DEFAULT
    assert lines == []
    assert fit.problems() == ()


def test_the_command_line_alone_patches_nothing_else() -> None:
    activation.install_command_line()
    assert applied() == {"cli-flags"}


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0"])
def test_an_unsupported_vllm_is_one_line_and_nothing_is_patched(
    version: str, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(probe, "vllm_version", lambda: version)
    activation.activate()
    assert applied() == set()
    assert lines == [f"stateful: off, serving as stock vLLM: {fit.problems()[0]}"]
    assert version in lines[0]
    assert "0.32.x and 0.33.x" in lines[0]


def test_beside_the_rust_frontend_only_engines_are_patched(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    activation.activate()
    assert applied() == BY_DEFAULT  # `LLM` does not know the variable
    undo_all()
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "a-model"])
    activation.activate()
    assert applied() == set()
    assert lines == []
    monkeypatch.setattr(multiprocessing.current_process(), "name", "EngineCore_0")
    activation.activate()
    assert len(lines) == 1
    assert "behind the Rust frontend" in lines[0]
    engine = {p.name for p in PATCHES if p.process in ("engine", "worker") and p.name in BY_DEFAULT}
    assert applied() == engine


def test_strict_an_unsupported_vllm_is_an_error_and_nothing_is_patched(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(probe, "vllm_version", lambda: "0.34.0")
    monkeypatch.setenv("VLLM_STATEFUL_STRICT", "1")
    with pytest.raises(UnsupportedError, match=r"vLLM 0\.34\.0 is not supported"):
        activation.activate()
    assert applied() == set()
    assert lines == []


@pytest.mark.parametrize("position", range(len(SESSIONS)))
def test_one_drifted_signature_turns_the_whole_feature_off_with_one_line(
    position: int, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    patch = [patch for patch in PATCHES if patch.feature == "sessions"][position]
    drift(monkeypatch, patch)
    activation.activate()
    assert applied() & SESSIONS == set()
    assert len(lines) == 1
    is_of_api = patch.process == "api"
    said = "stateful: off, serving as stock" if is_of_api else "stateful: feature 'sessions' is off"
    for part in (said, repr(patch.name)):
        assert part in lines[0]
    assert fit.problems()


def test_where_requests_have_no_tenant_no_process_keeps_sessions(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    """An engine that kept them all the same would share them between API keys."""
    drift(monkeypatch, patch_of("request-identity"))
    activation.activate()
    assert applied() == set()
    assert "request-identity" in os.environ[fit.OFF_ENV]
    assert fit.off_reason() is not None
    monkeypatch.setattr(multiprocessing.current_process(), "name", "EngineCore_0")
    activation.activate()
    assert applied() == set()
    assert len(lines) == 1


def test_a_drifted_feature_leaves_the_other_features_on(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    (anthropic,) = (patch for patch in PATCHES if patch.feature == "anthropic-usage")
    drift(monkeypatch, anthropic)
    activation.activate()
    assert applied() == BY_DEFAULT - {"anthropic-usage"}
    assert len(lines) == 1


def test_what_is_asked_for_is_patched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_HISTORY", "generated")
    monkeypatch.setenv("VLLM_STATEFUL_TOOL_CALL_CHECK", "end")
    activation.activate()
    assert applied() == BY_DEFAULT | {"finished-answer", "request-state"}


def test_a_response_cache_with_room_for_anything_is_put_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_RESPONSE_CACHE_BYTES", "1M")
    activation.activate()
    assert applied() == BY_DEFAULT | patches_of("responses")


def patches_of(*features: str) -> set[str]:
    return {patch.name for patch in PATCHES if patch.feature in features}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_disabled_stage_is_left_to_vllm_without_a_word(
    feature: str, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_DISABLE", feature)
    activation.activate()
    assert applied() == BY_DEFAULT - patches_of(feature)
    assert lines == []
    assert fit.problems() == ()


def ready() -> Any:
    """What an engine core answers a client that wants to send deltas."""
    return engine_utility.answer(None, "transport", {})["ready"]


def test_an_engine_takes_deltas_when_both_of_its_patches_are_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not ready()
    activation.activate()
    assert ready()
    undo_all()
    monkeypatch.setenv("VLLM_STATEFUL_DISABLE", "transport")
    process_config.cache_clear()
    activation.activate()
    assert not ready()


def test_one_drifted_end_of_the_transport_leaves_prompts_in_full(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    drift(monkeypatch, patch_of("prompt-miss"))
    activation.activate()
    assert applied() & patches_of("transport") == set()
    assert not ready()
    assert len(lines) == 1


def test_strict_a_drifted_signature_is_an_error_and_nothing_stays_patched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drift(monkeypatch, patch_of("session-identity"))
    monkeypatch.setenv("VLLM_STATEFUL_STRICT", "1")
    with pytest.raises(UnsupportedError, match="session-identity"):
        activation.activate()
    assert applied() == set()


def test_a_bad_option_is_an_error_before_anything_is_patched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_PIN_FRACTION", "2")
    with pytest.raises(ConfigError, match="VLLM_STATEFUL_PIN_FRACTION='2'"):
        activation.activate()
    assert applied() == set()


def test_our_options_are_no_part_of_the_key_of_vllms_compile_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another pin fraction compiles the same kernels: on a GPU that is minutes of start time."""
    activation.activate()
    factors = []
    for fraction in ("0.3", "0.4"):
        monkeypatch.setenv("VLLM_STATEFUL_PIN_FRACTION", fraction)
        factors.append(envs.compile_factors())
    assert factors[0] == factors[1]


# ---- the scheduler that is chosen ------------------------------------------------------------


def config_of(scheduler: Any = None, *, is_async: bool = False) -> Any:
    """What ``get_scheduler_cls`` reads of a SchedulerConfig."""
    return SimpleNamespace(scheduler_cls=scheduler, async_scheduling=is_async)


def chosen(config: Any) -> type:
    from vllm.config.scheduler import SchedulerConfig

    found: type = SchedulerConfig.get_scheduler_cls(config)
    return found


def test_both_stock_schedulers_have_a_stateful_counterpart() -> None:
    assert [chosen(config_of(is_async=a)) for a in (False, True)] == [Scheduler, AsyncScheduler]
    activation.activate()
    assert [chosen(config_of(is_async=a)) for a in (False, True)] == [
        StatefulScheduler,
        StatefulAsyncScheduler,
    ]


class Custom(Scheduler):  # type: ignore[misc]
    """A scheduler that the user chose."""


def test_a_scheduler_of_the_users_own_is_kept_with_one_line(lines: list[str]) -> None:
    activation.activate()
    assert chosen(config_of(Custom)) is Custom
    assert len(lines) == 1
    assert "Custom (scheduler_cls)" in lines[0]


def test_strict_a_scheduler_of_the_users_own_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_STRICT", "1")
    activation.activate()
    with pytest.raises(UnsupportedError, match="Custom"):
        chosen(config_of(Custom))
