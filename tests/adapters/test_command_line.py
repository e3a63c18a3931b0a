# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --plugin stateful --stateful-...`` through vLLM's own parser."""

import argparse
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serve_parser import Parse, make_parser, undo_all
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_stateful.adapters import activation, fit
from vllm_stateful.adapters.frontend import command_line
from vllm_stateful.adapters.frontend.command_line import _allow_endpoint_plugin
from vllm_stateful.compat import probe
from vllm_stateful.compat.ledger import PATCHES
from vllm_stateful.config import OPTIONS, StatefulConfig, process_config

pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of the plugin."""
    texts: list[str] = []

    def warning(text: str, *arguments: Any) -> None:
        texts.append(text % arguments)

    for module in (activation, command_line, fit):
        monkeypatch.setattr(module, "logger", SimpleNamespace(warning=warning))
    return texts


def refused(parse: Parse, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the parser says when it refuses these arguments with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def applied() -> set[str]:
    return {patch.name for patch in PATCHES if patch.is_applied}


# ---- turning it on ---------------------------------------------------------------------------


def test_without_our_flags_nothing_is_set_and_nothing_is_patched(parse: Parse) -> None:
    before = dict(os.environ)
    arguments = parse("--port", "8001")
    assert dict(os.environ) == before
    assert applied() == set()
    assert not arguments.enable_prompt_tokens_details
    assert arguments.plugin is None


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("option", "added", "gone"),
    [
        (["--stateful-history", "generated"], {"history"}, set()),
        (["--stateful-response-cache-bytes", "1M"], {"responses"}, set()),
        (["--stateful-disable", "transport,reasoning"], set(), {"transport", "reasoning"}),
    ],
)
def test_an_option_says_what_is_patched_before_and_behind_the_plugin(
    parse: Parse, option: list[str], added: set[str], gone: set[str], is_first: bool
) -> None:
    parse("--plugin", "stateful")
    features = {patch.feature for patch in PATCHES if patch.is_applied}
    undo_all()
    os.environ.pop("VLLM_STATEFUL")
    plugin = ["--plugin", "stateful"]
    parse(*(plugin + option if is_first else option + plugin))
    assert {p.feature for p in PATCHES if p.is_applied} == (features | added) - gone


@pytest.mark.parametrize("words", [["--plugin", "stateful"], ["--plugin=stateful"]])
def test_the_plugin_is_on_in_this_process_and_its_children(parse: Parse, words: list[str]) -> None:
    arguments = parse(*words)
    assert arguments.plugin == "stateful"
    assert os.environ["VLLM_STATEFUL"] == "1"
    assert "stateful" in os.environ["VLLM_PLUGINS"].split(",")
    assert applied() >= {patch.name for patch in PATCHES if patch.feature == "sessions"}


def test_options_reach_the_configuration_of_every_process(parse: Parse) -> None:
    arguments = parse(
        *("--plugin", "stateful", "--stateful-pin-fraction", "0.3", "--stateful-idle-seconds=60"),
        *("--stateful-tenant", "cache-salt", "--stateful-strict", "--stateful-check-invariants"),
    )
    assert os.environ["VLLM_STATEFUL_PIN_FRACTION"] == "0.3"
    assert process_config() == StatefulConfig(
        pin_fraction=0.3,
        idle_seconds=60.0,
        tenant="cache-salt",
        strict=True,
        check_invariants=True,
    )
    assert (arguments.stateful_pin_fraction, arguments.stateful_strict) == (0.3, True)


def test_options_may_come_before_the_plugin_and_be_written_with_underscores(parse: Parse) -> None:
    parse("--stateful_pin_fraction", "0.3", "--plugin", "stateful")
    assert process_config().pin_fraction == 0.3


@pytest.mark.parametrize("plugin_first", [True, False])
def test_what_is_patched_follows_the_options_wherever_they_stand(
    parse: Parse, plugin_first: bool
) -> None:
    options = ["--stateful-history", "generated", "--stateful-tool-call-check", "end"]
    options += ["--stateful-disable", "worker-ids"]
    plugin = ["--plugin", "stateful"]
    parse(*(plugin + options if plugin_first else options + plugin))
    assert applied() >= {"finished-answer", "request-state", "session-identity"}
    assert "worker-ids" not in applied()
    assert fit.problems() == ()


def test_options_may_come_from_vllms_config_file(parse: Parse, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("plugin: stateful\nstateful-pin-fraction: 0.3\nstateful-strict: true\n")
    parse("--config", str(file))
    assert os.environ["VLLM_STATEFUL"] == "1"
    assert process_config() == StatefulConfig(pin_fraction=0.3, strict=True)


def test_an_option_counts_where_the_options_were_read_before_it(
    parse: Parse, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not process_config().strict
    parse("--plugin", "stateful", "--stateful-pin-fraction", "0.3")
    assert process_config().pin_fraction == 0.3
    refused(parse, capsys, "--stateful-strict", "--plugin", "nosuch")


def test_the_hook_adds_its_flags_once() -> None:
    parser = argparse.ArgumentParser()
    command_line.extend_parser(parser)
    command_line.extend_parser(parser)
    assert len([a for a in parser._actions if a.dest == "plugin"]) == 1


# ---- usage that shows what was reused --------------------------------------------------------


def test_cached_tokens_are_shown_by_default_with_the_plugin(parse: Parse) -> None:
    assert parse("--plugin", "stateful").enable_prompt_tokens_details is True
    assert not parse("--plugin", "nosuch").enable_prompt_tokens_details


REFUSALS = ["--no-enable-prompt-tokens-details", "--no-enable_prompt_tokens_details"]


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("plugin_first", [True, False])
def test_the_users_own_choice_is_respected(parse: Parse, refusal: str, plugin_first: bool) -> None:
    words = ["--plugin", "stateful", refusal] if plugin_first else [refusal, "--plugin", "stateful"]
    assert parse(*words).enable_prompt_tokens_details is False


def test_the_users_own_choice_in_a_config_file_is_respected(parse: Parse, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("enable-prompt-tokens-details: false\n")
    arguments = parse("--config", str(file), "--plugin", "stateful")
    assert arguments.enable_prompt_tokens_details is False


def test_enabled_by_the_environment_cached_tokens_are_shown_too() -> None:
    os.environ["VLLM_STATEFUL"] = "1"
    parser = make_parser()
    assert parser.parse_args(["some/model"]).enable_prompt_tokens_details is True
    refusing = ["some/model", REFUSALS[0]]
    assert parser.parse_args(refusing).enable_prompt_tokens_details is False


# ---- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--stateful-pin-fraction", "1.5"),
        ("--stateful-pin-fraction", "lots"),
        ("--stateful-idle-seconds", "0"),
        ("--stateful-tenant", "ip-address"),
    ],
)
def test_a_bad_value_is_refused_naming_key_value_and_what_is_allowed(
    parse: Parse, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    said = refused(parse, capsys, "--plugin", "stateful", flag, value)
    (option,) = (option for option in OPTIONS if option.flag == flag)
    assert f"{flag}={value!r}: must be {option.allowed}" in said
    assert option.env not in os.environ


def test_an_unknown_option_is_refused(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(parse, capsys, "--plugin", "stateful", "--stateful-magic", "1")
    assert "--stateful-magic" in said


def test_a_bad_variable_is_refused_like_a_bad_flag(
    parse: Parse, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ["VLLM_STATEFUL_PIN_FRACTION"] = "2"
    said = refused(parse, capsys, "--plugin", "stateful")
    assert "VLLM_STATEFUL_PIN_FRACTION='2': must be a number from 0 to 1" in said


def test_an_unknown_plugin_is_one_line_and_stock_vllm(parse: Parse, warnings: list[str]) -> None:
    arguments = parse("--plugin", "nosuch")
    assert arguments.plugin == "nosuch"
    assert warnings == [
        "stateful: off, serving as stock vLLM: --plugin 'nosuch': no such plugin; "
        "there is 'stateful'"
    ]
    assert applied() == set()
    assert not {"VLLM_STATEFUL", "VLLM_PLUGINS"} & set(os.environ)


@pytest.mark.parametrize("strict_first", [True, False])
def test_strict_an_unknown_plugin_is_refused(
    parse: Parse, capsys: pytest.CaptureFixture[str], strict_first: bool
) -> None:
    plugin, strict = ["--plugin", "nosuch"], ["--stateful-strict"]
    words = strict + plugin if strict_first else plugin + strict
    assert "--plugin 'nosuch': no such plugin" in refused(parse, capsys, *words)


@pytest.mark.parametrize("strict_first", [True, False])
def test_strict_an_unsupported_vllm_is_refused(
    parse: Parse,
    capsys: pytest.CaptureFixture[str],
    strict_first: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "vllm_version", lambda: "0.34.0")
    plugin, strict = ["--plugin", "stateful"], ["--stateful-strict"]
    words = strict + plugin if strict_first else plugin + strict
    assert "vLLM 0.34.0 is not supported" in refused(parse, capsys, *words)


def test_an_unsupported_vllm_is_one_line_and_stock_vllm(
    parse: Parse, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "vllm_version", lambda: "0.34.0")
    parse("--plugin", "stateful")
    assert len(warnings) == 1
    assert applied() == set()


# ---- help ------------------------------------------------------------------------------------


def test_help_shows_the_group(parser: FlexibleArgumentParser) -> None:
    assert "StatefulPlugin" in parser.format_help()


@pytest.mark.parametrize("keyword", ["StatefulPlugin", "stateful", "all"])
def test_help_on_a_keyword_shows_every_option(
    parser: FlexibleArgumentParser, keyword: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", keyword)
    text = parser.format_help()
    assert all(option.flag in text for option in OPTIONS)
    assert ("--plugin NAME" in text) == (keyword != "stateful")


# ---- VLLM_PLUGINS ----------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, general: list[str], endpoint: list[str]) -> None:
    """As if these plugins were installed."""
    groups = {"vllm.general_plugins": general, command_line.ENDPOINT_GROUP: endpoint}

    def entry_points(*, group: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in groups.get(group, [])]

    monkeypatch.setattr(command_line, "entry_points", entry_points)


def test_unset_all_general_plugins_stay_on_and_ours_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, ["lora-resolver", "stateful", "other"], ["stateful"])
    _allow_endpoint_plugin()
    assert os.environ["VLLM_PLUGINS"] == "lora-resolver,other,stateful"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "stateful"),
        ("other", "other,stateful"),
        ("stateful", "stateful"),
        ("stateful,other", "stateful,other"),
    ],
)
def test_set_ours_is_added_and_the_rest_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    install(monkeypatch, ["lora-resolver", "stateful"], ["stateful"])
    os.environ["VLLM_PLUGINS"] = before
    _allow_endpoint_plugin()
    assert os.environ["VLLM_PLUGINS"] == after
    _allow_endpoint_plugin()
    assert os.environ["VLLM_PLUGINS"] == after


def test_naming_plugins_never_switches_on_somebody_elses_routes(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    install(monkeypatch, ["both", "stateful"], ["both", "stateful"])
    _allow_endpoint_plugin()
    assert "VLLM_PLUGINS" not in os.environ
    assert len(warnings) == 1
    assert "routes of both" in warnings[0]


def test_somebody_elses_routes_that_stay_unnamed_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    install(monkeypatch, ["stateful"], ["routes-only", "stateful"])
    _allow_endpoint_plugin()
    assert os.environ["VLLM_PLUGINS"] == "stateful"
    assert warnings == []


def test_every_group_that_vllm_loads_by_name_is_known() -> None:
    from vllm import plugins

    groups = {
        value
        for name, value in vars(plugins).items()
        if name.endswith("_PLUGINS_GROUP") and isinstance(value, str)
    }
    assert groups <= {*command_line.GENERAL_GROUPS, command_line.ENDPOINT_GROUP}


def test_the_operators_key_is_not_on_the_namespace(parse: Parse) -> None:
    arguments = parse("--plugin", "stateful", "--stateful-admin-key", "planted-key")
    assert "planted" not in repr(arguments)
    assert process_config().admin_key == "planted-key"
    assert "planted" not in repr(process_config())
