# SPDX-License-Identifier: Apache-2.0
"""A Prometheus server of our own, and `promtool check metrics`."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from benchmarks.demo.dashboard.panels import SCRAPE_S, STEP_S
from benchmarks.demo.servers import ServerFailedError, stop_group
from benchmarks.ports import HOST, free_port

START_LIMIT_S = 60
PROGRAMS = ("prometheus", "promtool")


def missing_programs() -> list[str]:
    """Those of Prometheus that are not on this machine."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


class Prometheus:
    """Scrapes the servers that it is told of; use it in a `with` block.

    Args:
        folder: of its data, its configuration and its log.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._targets = folder / "targets.json"
        self._addresses: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://{HOST}:{free_port()}"

    def __enter__(self) -> Self:
        shutil.rmtree(self._folder / "data", ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._targets.write_text("[]")
        config = {
            "global": {"scrape_interval": f"{SCRAPE_S}s"},
            "scrape_configs": [
                {
                    "job_name": "vllm",
                    "file_sd_configs": [
                        {"files": [str(self._targets.resolve())], "refresh_interval": "1s"}
                    ],
                }
            ],
        }
        path = self._folder / "prometheus.yml"
        path.write_text(json.dumps(config))  # YAML has JSON
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={path}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_until_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process, self._process = self._process, None
        if process is not None:
            stop_group(process)

    def scrape(self, url: str) -> None:
        """Scrape this server too, and return when it was scraped."""
        self._addresses.append(url.removeprefix("http://"))
        self._targets.write_text(json.dumps([{"targets": self._addresses}]))
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            result = self._get("query", query=f'up{{instance="{self._addresses[-1]}"}} == 1')
            if result:
                return
            time.sleep(0.5)
        raise ServerFailedError(f"Prometheus does not scrape {url}; see {self._folder}")

    def over_time(self, query: str, start: float, end: float) -> list[dict[str, Any]]:
        """The series of a query between two times (seconds since 1970), as a panel draws them."""
        return self._get("query_range", query=query, start=start, end=end, step=STEP_S)

    def _get(self, path: str, **parameters: Any) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        document = answer.raise_for_status().json()
        result: list[dict[str, Any]] = document["data"]["result"]
        return result

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/-/ready", timeout=2).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        log = (self._folder / "prometheus.log").read_text(errors="replace")[-2000:]
        raise ServerFailedError(f"Prometheus is not ready after {START_LIMIT_S} s:\n{log}")


def check_metrics(text: str) -> list[str]:
    """What `promtool check metrics` finds in a scrape, one finding a line; empty when nothing."""
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    return sorted(filter(None, (done.stdout + done.stderr).splitlines()))
