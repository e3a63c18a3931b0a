# SPDX-License-Identifier: Apache-2.0
"""Options: what is allowed, and what the error says."""

import dataclasses
import os
from typing import Any

import pytest

from vllm_stateful.config import (
    ENABLE_ENV,
    FEATURES,
    OPTIONS,
    PROFILES,
    Option,
    StatefulConfig,
    is_enabled,
    load_config,
    parse_bool,
    process_config,
    set_by_profile,
    write_option,
)
from vllm_stateful.errors import ConfigError, StatefulError, UnsupportedError
from vllm_stateful.plugin import _asks_for_cli

BY_FIELD = {option.field: option for option in OPTIONS}
YEAR = "31536000"


def option_id(option: Option) -> str:
    return option.field


def test_options_and_fields_are_the_same_in_the_same_order() -> None:
    fields = [field.name for field in dataclasses.fields(StatefulConfig)]
    assert [option.field for option in OPTIONS] == fields


def test_an_empty_environment_gives_the_defaults() -> None:
    assert load_config({}) == StatefulConfig()
    assert load_config({"PATH": "x", ENABLE_ENV: "1"}) == StatefulConfig()


def test_defaults_are_allowed_values() -> None:
    for option in OPTIONS:
        default = getattr(StatefulConfig(), option.field)
        if default == "":  # not given
            continue
        text = ",".join(default) if isinstance(default, frozenset) else str(default)
        assert option.read(text, option.env) == default


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        StatefulConfig().pin_fraction = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("option", OPTIONS, ids=option_id)
def test_names_of_flag_and_variable_follow_from_the_field(option: Option) -> None:
    assert option.env == "VLLM_STATEFUL_" + option.field.upper()
    assert option.flag == "--stateful-" + option.field.replace("_", "-")
    assert option.help.endswith(".")


ALLOWED = [
    ("pin_fraction", "0", 0.0),
    ("pin_fraction", "1", 1.0),
    ("pin_fraction", "0.25", 0.25),
    ("resume_points", "1", 1),
    ("resume_points", "64", 64),
    ("idle_seconds", "1", 1.0),
    ("idle_seconds", YEAR, 31536000.0),
    ("tenant", "api-key", "api-key"),
    ("tenant", "cache-salt", "cache-salt"),
    ("order", "arrival", "arrival"),
    ("order", "least-served", "least-served"),
    ("verify_tokens", "0", 0.0),
    ("verify_tokens", "1", 1.0),
    ("verify_tokens", "1e-3", 0.001),
    ("render_bytes", "0", 0),
    ("render_bytes", "1000000", 1_000_000),
    ("render_bytes", "64K", 64 << 10),
    ("render_bytes", "256m", 256 << 20),
    ("render_bytes", "1.5G", 3 << 29),
    ("base_bytes", "2g", 2 << 30),
    ("base_bytes", "0K", 0),
    ("disable", "", frozenset()),
    ("disable", "tokenize", frozenset({"tokenize"})),
    ("disable", " transport , worker-ids,", frozenset({"transport", "worker-ids"})),
    ("disable", "transport,transport", frozenset({"transport"})),
    ("disable", ",".join(FEATURES), frozenset(FEATURES)),
    ("strict", "1", True),
    ("strict", "0", False),
    ("check_invariants", "true", True),
    ("check_invariants", "", False),
]


@pytest.mark.parametrize(("field", "text", "value"), ALLOWED)
def test_allowed_values_are_read(field: str, text: str, value: Any) -> None:
    config = load_config({BY_FIELD[field].env: text})
    assert config == dataclasses.replace(StatefulConfig(), **{field: value})


REFUSED = [
    *[("pin_fraction", text) for text in ("-0.01", "1.01", "nan", "inf", "half", "", "0,5", "50%")],
    *[("resume_points", text) for text in ("0", "65", "-1", "1.5", "many", "")],
    *[("idle_seconds", text) for text in ("0", "0.99", "31536001", "-1", "inf", "nan", "15m", "")],
    *[("tenant", text) for text in ("", "API-KEY", "api_key", "none", " api-key")],
    *[("order", text) for text in ("", "fcfs", "least_served", "Arrival")],
    *[("verify_tokens", text) for text in ("-0.1", "1.1", "nan", "1%", "")],
    *[
        (field, text)
        for field in ("render_bytes", "base_bytes")
        for text in ("", "-1", "-1K", "1.5", "K", "1T", "1GB", "1 0", "nanG", "infG", "1e999G")
    ],
    *[("disable", text) for text in ("sessions", "Tokenize", "tokenize;transport", "all", "none")],
    *[("strict", text) for text in ("2", "-1", "maybe", "t")],
    *[("check_invariants", text) for text in ("2", "enabled")],
]


@pytest.mark.parametrize(("field", "text"), REFUSED)
def test_an_error_names_key_value_and_what_is_allowed(field: str, text: str) -> None:
    option = BY_FIELD[field]
    for key in (option.env, option.flag):
        with pytest.raises(ConfigError) as caught:
            option.read(text, key)
        assert str(caught.value) == f"{key}={text!r}: must be {option.allowed}"
    with pytest.raises(ConfigError, match=option.env):
        load_config({option.env: text})


def test_what_is_allowed_names_both_bounds() -> None:
    assert BY_FIELD["pin_fraction"].allowed == "a number from 0 to 1"
    assert BY_FIELD["idle_seconds"].allowed == f"a number of seconds from 1 to {YEAR}"
    assert BY_FIELD["tenant"].allowed == "'api-key' or 'cache-salt'"
    assert BY_FIELD["base_bytes"].allowed == "a number of bytes (K, M, G allowed)"
    assert all(feature in BY_FIELD["disable"].allowed for feature in FEATURES)


def test_an_unknown_variable_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"VLLM_STATEFUL_PIN_FRACTON": "0.3"})
    assert str(caught.value).startswith("VLLM_STATEFUL_PIN_FRACTON: no such option; there are ")
    assert all(option.env in str(caught.value) for option in OPTIONS)


def test_a_variable_that_only_looks_alike_is_ignored() -> None:
    assert load_config({"VLLM_STATEFULNESS": "1", "X_VLLM_STATEFUL_STRICT": "1"}) == (
        StatefulConfig()
    )


@pytest.mark.parametrize("text", ["1", "true", "TRUE", "yes", "On", " 1 "])
def test_on(text: str) -> None:
    assert is_enabled({ENABLE_ENV: text})
    assert parse_bool(text)


@pytest.mark.parametrize("text", ["0", "false", "False", "no", "OFF", "", "  "])
def test_off(text: str) -> None:
    assert not is_enabled({ENABLE_ENV: text})
    assert not parse_bool(text)


def test_unset_is_off() -> None:
    assert not is_enabled({})


@pytest.mark.parametrize("text", ["2", "stateful", "enable"])
def test_neither_on_nor_off_is_an_error_that_names_key_and_value(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        is_enabled({ENABLE_ENV: text})
    assert str(caught.value) == f"VLLM_STATEFUL={text!r}: must be 1 or 0"


def test_without_an_argument_the_environment_of_the_process_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith(ENABLE_ENV)]:
        monkeypatch.delenv(name)
    assert (is_enabled(), load_config()) == (False, StatefulConfig())
    monkeypatch.setenv(ENABLE_ENV, "1")
    monkeypatch.setenv("VLLM_STATEFUL_PIN_FRACTION", "0.75")
    assert (is_enabled(), load_config()) == (True, StatefulConfig(pin_fraction=0.75))


def test_errors_are_one_tree_and_a_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, StatefulError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(UnsupportedError, StatefulError)


@pytest.mark.parametrize(
    ("argv", "asks"),
    [
        (["vllm", "serve", "model"], False),
        (["vllm", "serve", "model", "--plugin", "stateful"], True),
        (["vllm", "serve", "model", "--plugin=stateful"], True),
        (["vllm", "serve", "model", "--stateful-strict"], True),
        (["vllm", "serve", "--config", "serve.yaml"], True),
        (["vllm", "serve", "--help=stateful"], True),
        (["vllm", "serve", "-h"], True),
        (["vllm", "serve", "-hf"], False),
        (["--plugin"], False),
        ([], False),
    ],
)
def test_only_a_command_line_that_may_name_our_options_installs_them(
    argv: list[str], asks: bool
) -> None:
    assert _asks_for_cli(argv) is asks


def test_a_process_reads_its_options_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_VERIFY_TOKENS", "0.5")
    assert process_config().verify_tokens == 0.5
    monkeypatch.setenv("VLLM_STATEFUL_VERIFY_TOKENS", "0.25")
    assert process_config().verify_tokens == 0.5
    process_config.cache_clear()
    assert process_config().verify_tokens == 0.25


def test_an_option_that_is_written_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    option = BY_FIELD["verify_tokens"]
    monkeypatch.setenv(option.env, "0.5")
    assert process_config().verify_tokens == 0.5
    write_option(option, "0.25")
    assert process_config().verify_tokens == 0.25


def test_a_profile_sets_what_is_not_given() -> None:
    made = load_config({"VLLM_STATEFUL_PROFILE": "fast"})
    assert (made.history, made.tool_call_check, made.drafts) == ("generated", "end", "on")
    environ = {"VLLM_STATEFUL_PROFILE": "fast", "VLLM_STATEFUL_DRAFTS": "off"}
    assert load_config(environ).drafts == "off"
    assert set_by_profile(environ) == {"history": "generated", "tool_call_check": "end"}
    assert set_by_profile({}) == set_by_profile({"VLLM_STATEFUL_PROFILE": "exact"}) == {}
    assert load_config({"VLLM_STATEFUL_PROFILE": "exact"}) == load_config({})


@pytest.mark.parametrize("profile", PROFILES)
def test_what_a_profile_sets_is_allowed(profile: str) -> None:
    for name, value in PROFILES[profile].items():
        assert BY_FIELD[name].read(value, name) == value
