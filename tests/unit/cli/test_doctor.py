# SPDX-License-Identifier: Apache-2.0
"""The command without vLLM: its words, and what becomes of the process that asks vLLM."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vllm_stateful.cli import doctor, installed
from vllm_stateful.cli.__main__ import main
from vllm_stateful.cli.findings import Finding

OK = '{"section": "sessions", "mark": "ok", "text": "kept", "facts": {}}'


@pytest.fixture(autouse=True)
def _no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without any variable of ours, and with a vLLM that fits."""
    import os

    for name in [name for name in os.environ if name.startswith("VLLM_STATEFUL")]:
        monkeypatch.delenv(name)
    versions = Finding("versions", "ok", "all fine", {"vllm": "0.32.0"})
    monkeypatch.setattr(installed, "versions", lambda: versions)
    monkeypatch.setattr(installed, "entry_points", lambda: Finding("entry points", "ok", "found"))
    monkeypatch.setattr(installed, "fit", lambda version: iter(()))


@pytest.fixture
def examiner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A program in the place of the one that asks vLLM."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = tmp_path / "asks_nobody.py"

    class Stands(doctor.Examiner):
        def __init__(self, words: Sequence[str]) -> None:
            super().__init__(words, seconds=20, module="asks_nobody")

    monkeypatch.setattr(doctor, "Examiner", Stands)
    return made


def program(path: Path, *lines: str) -> None:
    path.write_text("import os, sys, time\nout = open(sys.argv[1], 'a')\n" + "\n".join(lines))


def test_help_is_fast_for_it_imports_no_vllm() -> None:
    code = (
        "import sys\nfrom vllm_stateful.cli.__main__ import main\n"
        "try:\n    main(['doctor', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'vllm', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MODEL" in done.stdout


def test_the_words_of_the_server_are_passed_on_in_their_order(
    examiner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(
        examiner,
        "import json",
        "words = ' '.join(sys.argv[2:])",
        "found = {'section': 'words', 'mark': 'ok', 'text': words, 'facts': {}}",
        "out.write(json.dumps(found) + chr(10))",
    )
    assert main(["doctor", "--dtype", "float32", "a/model", "--json", "-tp", "2"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert findings[-1]["text"] == "--dtype float32 a/model -tp 2"


def test_what_was_found_is_printed(examiner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(examiner, f"out.write({OK!r} + chr(10))")
    assert main(["doctor", "model"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ok   sessions     kept"


def test_arguments_that_vllm_refuses_are_one_line_and_status_two(
    examiner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(examiner, """out.write('{"refused": "no such model"}' + chr(10))""")
    assert main(["doctor", "model"]) == 2
    assert capsys.readouterr().err == "vllm-stateful doctor: no such model\n"
    assert main(["doctor", "model", "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {"status": 2, "error": "no such model"}


def test_a_bad_variable_is_said_before_vllm_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_STATEFUL_PIN_FRACTION", "2")
    assert main(["doctor"]) == 2
    assert "VLLM_STATEFUL_PIN_FRACTION='2': must be a number" in capsys.readouterr().err


def test_what_was_found_before_a_crash_is_kept(
    examiner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(
        examiner,
        f"out.write({OK!r} + chr(10)); out.flush()",
        "print('no memory for this', file=sys.stderr, flush=True)",
        "os._exit(9)",
    )
    assert main(["doctor", "model"]) == 1
    said = capsys.readouterr().out
    assert "ok   sessions     kept" in said
    assert "not known before the start: vLLM ended with 9: no memory for this" in said


def test_a_vllm_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program(tmp_path / "hangs.py", "time.sleep(60)")
    with doctor.Examiner(["model"], seconds=0.5, module="hangs") as examiner:
        (finding,) = examiner.findings()
    assert finding.mark == "warn"
    assert "took longer than" in finding.text


def test_a_vllm_that_is_not_supported_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = Finding("versions", "off", "vLLM 0.34.0 is not supported")
    monkeypatch.setattr(installed, "versions", lambda: versions)
    monkeypatch.setattr(doctor, "Examiner", None)
    assert main(["doctor", "model"]) == 1
    assert "not supported" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["nosuch"], ["--nosuch"]])
def test_other_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
