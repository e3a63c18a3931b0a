# SPDX-License-Identifier: Apache-2.0
"""The routers, each started with the file of deploy/routers/ that its users start it with.

Only the addresses in a file are replaced. A router that is not installed is said to be so.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from benchmarks.demo.machine import ROOT
from benchmarks.demo.servers import ServerFailedError, stop_group
from benchmarks.ports import HOST, free_port

FILES = ROOT / "deploy" / "routers"
API_KEY = f"sk-{secrets.token_hex(32)}"
"""The key that clients send, and that LiteLLM sends to the replicas; another one in each run."""

START_LIMIT_S = 120

LISTEN, FIRST, SECOND, METRICS = "8000", "8001", "8002", "29000"
"""The ports in the files."""


@dataclass(frozen=True)
class Kind:
    """A kind of router.

    Attributes:
        program: the program that must be on PATH.
        file: the name of its file in deploy/routers/.
        command: the command line, from the file with our addresses and the port to listen on.
        version: the arguments that make it print its version.
        change: what else is done to the text of the file.
        ready: the path that answers 200 when it serves.
    """

    program: str
    file: str
    command: Callable[[Path, int], Sequence[str]]
    version: tuple[str, ...]
    change: Callable[[str], str] = lambda text: text
    ready: str = "/v1/models"


def _without_hash(text: str) -> str:
    """nginx's own order is round robin; nothing else is changed."""
    changed, count = re.subn(r"\n *hash [^\n]*\n", "\n", text)
    if count != 1:
        raise ValueError("nginx.conf has no single line with `hash`")
    return changed


def _nginx(file: Path, port: int) -> list[str]:
    return ["nginx", "-c", str(file), "-p", str(file.parent), "-g", "daemon off;"]


KINDS = {
    "round-robin": Kind("nginx", "nginx.conf", _nginx, ("-v",), _without_hash),
    "nginx": Kind("nginx", "nginx.conf", _nginx, ("-v",)),
    "envoy": Kind(
        "envoy",
        "envoy.yaml",
        lambda file, port: ["envoy", "-c", str(file), "--concurrency", "1", "-l", "warn"],
        ("--version",),
    ),
    "litellm": Kind(
        "litellm",
        "litellm.yaml",
        lambda file, port: ["litellm", "--config", str(file), "--host", HOST, "--port", str(port)],
        ("--version",),
        ready="/health/liveliness",
    ),
    "vllm-router": Kind(
        "vllm-router", "vllm-router.sh", lambda file, port: ["sh", str(file)], ("--version",)
    ),
}


def missing(name: str) -> str | None:
    """Why a router cannot be started here; None when it can."""
    program = KINDS[name].program
    return None if shutil.which(program) else f"{program} is not on PATH"


def version_of(name: str) -> str:
    """The name and the version of a router's program."""
    program = KINDS[name].program
    said = _package_version(program) if name == "vllm-router" else _said(name)
    found = re.search(r"\d+\.\d+(\.\d+)*", said)
    return f"{program} {found[0] if found else 'of an unknown version'}"


def _said(name: str) -> str:
    """What a program says of its version, without what it logs beside that."""
    done = subprocess.run(
        [KINDS[name].program, *KINDS[name].version],
        capture_output=True,
        text=True,
        check=False,
        env=_environment(),
        stdin=subprocess.DEVNULL,
    )
    lines = (done.stdout + done.stderr).splitlines()
    return next((line for line in lines if "version" in line.casefold()), "")


def _package_version(program: str) -> str:
    """The version of the package that is installed where a program lies."""
    python = Path(os.path.realpath(str(shutil.which(program)))).with_name("python")
    code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    done = subprocess.run([python, "-c", code, program], capture_output=True, text=True, check=True)
    return done.stdout


def _environment() -> dict[str, str]:
    added = {
        "LITELLM_MASTER_KEY": API_KEY,
        "REPLICA_KEY": API_KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **added}


class Router:
    """One running router.

    Args:
        name: one of `KINDS`.
        ports: the ports of the two replicas.
        model: the name under which they serve.
        folder: its file and its log go here.
    """

    def __init__(self, name: str, ports: tuple[int, int], model: str, folder: Path) -> None:
        self.name = name
        self.port = free_port()
        self.log = folder / f"{name}.log"
        self._kind = KINDS[name]
        made = {LISTEN: self.port, FIRST: ports[0], SECOND: ports[1], METRICS: free_port()}
        text = self._kind.change((FILES / self._kind.file).read_text())
        text = re.sub(r"\b(8000|8001|8002|29000)\b", lambda found: str(made[found[1]]), text)
        text = text.replace("my-model", model).replace("/tmp/nginx", f"{folder}/nginx")
        self._file = folder / f"{name}-{self._kind.file}"
        self._file.write_text(text)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._kind.command(self._file, self.port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask it to end, then kill what is left of its group."""
        process, self._process = self._process, None
        if process is not None:
            stop_group(process)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        headers = {"authorization": f"Bearer {API_KEY}"}
        assert self._process is not None
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                path = self.url + self._kind.ready
                if httpx.get(path, headers=headers, timeout=2).status_code == httpx.codes.OK:
                    return
            time.sleep(0.5)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
        raise ServerFailedError(f"{self.name} does not serve. The end of {self.log}:\n{tail}")
