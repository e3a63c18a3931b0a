# SPDX-License-Identifier: Apache-2.0
"""Programs that need vLLM, each a fork of a process that has imported it and done nothing else.

Importing vLLM takes longer than most of these programs do. A fork is as good as a process of its
own: what is asked of it, its environment too, is the program's; vLLM has no thread, no plugin and
no engine yet. Servers (`vllm serve`) are started as a user would.

    python tests/forked.py MODULE ...   # imports these, then reads jobs, one a line
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

SECONDS = 1200
EAGER = {"TORCHDYNAMO_DISABLE": "1"}
"""vLLM compiles one function of its sampler also where it is eager, for 6 s in each engine."""


class Forks:
    """A process to fork from.

    Args:
        modules: imported in this order.
        path: folders where they are found, beside the usual ones.
        environment: beside that of this process, while they are imported.
    """

    def __init__(self, *modules: str, path: tuple[Path, ...] = (), **environment: str) -> None:
        self._folder = TemporaryDirectory()
        self._answers: dict[int, Future[int]] = {}
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | EAGER | environment | {"PYTHONPATH": ":".join(map(str, path))},
        )
        threading.Thread(target=self._read, daemon=True).start()
        atexit.register(self.close)

    def run(self, program: Path, *arguments: object, **environment: str) -> str:
        """Wait for a program; what it printed. AssertionError with it where it failed.

        Several threads may wait for a program each.
        """
        with self._lock:
            number = len(self._answers)
            answer = self._answers[number] = Future()
            printed = Path(self._folder.name) / f"{number}.log"
            job = {
                "number": number,
                "command": [str(program), *map(str, arguments)],
                "environment": os.environ | EAGER | environment,
                "printed": str(printed),
            }
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        code = answer.result(SECONDS + 60)
        said = printed.read_text(errors="replace")
        assert code == 0, f"{program.name} ended with {code}:\n{said[-4000:]}"
        return said

    def close(self) -> None:
        """End the process; programs that run go on."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            number, code = map(int, line.split())
            self._answers[number].set_result(code)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ChildProcessError("the process to fork from has ended"))


@cache
def with_vllm() -> Forks:
    """To fork offline engines from; the same for all tests of this process."""
    return Forks("vllm.entrypoints.llm", VLLM_LOGGING_LEVEL="WARNING")


def main() -> None:
    """Fork for each line, and write its number and exit code when the program ends."""
    before = dict(os.environ)
    for module in sys.argv[1:]:
        __import__(module)
    theirs = {name: value for name, value in os.environ.items() if before.get(name) != value}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:  # waits for the program, so that the next job need not
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            job = json.loads(line)
            program = os.fork()
            if program == 0:
                job["environment"] |= theirs
                run_program(job)
            _, status = os.waitpid(program, 0)
            code = os.waitstatus_to_exitcode(status)
            os.write(1, f"{job['number']} {code}\n".encode())
            os._exit(0)


def run_program(job: dict[str, Any]) -> NoReturn:
    """Be the program, as if it had been started by its name."""
    signal.alarm(SECONDS)
    printed = os.open(job["printed"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in enumerate((nothing, printed, printed)):
        os.dup2(place, descriptor)
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = job["command"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    sys.path[1:1] = filter(None, job["environment"].get("PYTHONPATH", "").split(os.pathsep))
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
