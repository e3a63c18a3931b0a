# SPDX-License-Identifier: Apache-2.0
"""``vllm-stateful doctor``: what the plugin will do here, before a server is started.

The part that needs vLLM runs in a process of its own (``adapters.doctor``). If that process fails,
hangs or is killed, this is a finding like any other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_stateful.cli import installed
from vllm_stateful.cli.findings import Finding, as_json, as_text, status_of
from vllm_stateful.config import is_enabled, load_config
from vllm_stateful.errors import ConfigError

EXAMINER = "vllm_stateful.adapters.doctor"
SECONDS = 55.0
REFUSED = 2
"""The exit status for arguments with which a server would not start."""

_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1"}

_EPILOG = """\
MODEL and OPTIONS are those of `vllm serve`, --stateful-* included. No weights are loaded and no
server is started. Exit status: 0 when all that was asked for would be on, 1 when something is
off or not known, 2 for arguments that a server would not start with.
"""


class RefusedError(Exception):
    """A server would not start with these arguments."""


def add_command(commands: Any) -> None:
    """Add the subcommand to those of ``vllm-stateful``."""
    parser = commands.add_parser(
        "doctor",
        help="what the plugin will do here, before a server is started",
        description=__doc__.partition(": ")[2].partition("\n")[0].capitalize(),
        usage="vllm-stateful doctor [-h] [--json] [MODEL] [OPTIONS]",
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run, takes_others=True)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Look at everything, and print the findings; returns the exit status."""
    try:
        findings = look(words)
    except (RefusedError, ConfigError) as error:
        if options.json:
            sys.stdout.write(json.dumps({"status": REFUSED, "error": str(error)}, indent=1) + "\n")
        else:
            print(f"vllm-stateful doctor: {error}", file=sys.stderr)
        return REFUSED
    status = status_of(findings)
    sys.stdout.write(as_json(findings, status) if options.json else as_text(findings))
    return status


def look(words: Sequence[str]) -> list[Finding]:
    """All findings.

    Raises:
        RefusedError: vLLM refuses the arguments.
        ConfigError: an environment variable of ours has a value that is not allowed.
    """
    is_enabled()
    load_config()
    versions = installed.versions()
    if versions.mark != "ok":
        return [versions, installed.entry_points()]
    with Examiner(words) as examiner:
        fit = list(installed.fit(str(versions.facts["vllm"])))
        examined = list(examiner.findings())
    return [versions, installed.entry_points(), *fit, *examined]


class Examiner:
    """The process that asks vLLM.

    Args:
        words: the words of the command line, without ours.
        seconds: how long the process may take.
        module: the module that is run.
    """

    def __init__(
        self, words: Sequence[str], seconds: float = SECONDS, module: str = EXAMINER
    ) -> None:
        self._words, self._seconds, self._module = words, seconds, module

    def __enter__(self) -> Examiner:
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-stateful-")
        folder = Path(self._folder.name)
        self._found, self._log = folder / "findings", folder / "log"
        self._found.touch()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, str(self._found), *self._words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_QUIET, **os.environ},
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def findings(self) -> Iterator[Finding]:
        """The findings of the process, and the reason if it did not find more.

        Raises:
            RefusedError: vLLM refuses the arguments.
        """
        try:
            code: int | None = self._process.wait(self._seconds)
        except subprocess.TimeoutExpired:
            code = None
        lines = self._found.read_text().splitlines()
        made = [json.loads(line) for line in lines if line.endswith("}")]
        for each in made:
            if "refused" in each:
                raise RefusedError(each["refused"])
            yield Finding(**each)
        if code != 0:
            why = f"vLLM took longer than {self._seconds:.0f} s"
            if code is not None:
                why = f"vLLM ended with {code}: {self._last_line()}"
            text = f"not known before the start: {why}"
            yield Finding("vLLM", "warn", text, {"is_known": False})

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
