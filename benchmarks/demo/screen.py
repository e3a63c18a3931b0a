# SPDX-License-Identifier: Apache-2.0
"""What the user watches: a live view on a terminal, plain lines everywhere else."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from benchmarks.demo.report import Row
from benchmarks.demo.servers import Server
from benchmarks.demo.table import make_table, plain_head, plain_row

PLAIN_INTERVAL_S = 10.0
PLAIN_WIDTH = 140


class StartView:
    """The servers while they start: seconds, and the last line of each log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._next_plain_s = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, servers: Sequence[Server]) -> None:
        """Draw the state; without a terminal only the last one, every ten seconds."""
        lines = [self._line(server) for server in servers]
        if self._console.is_terminal:
            width = self._console.width - 1
            self._live.update(Text("\n".join(line[:width] for line in lines)), refresh=True)
        elif time.monotonic() >= self._next_plain_s or servers[-1].ready_after_s is not None:
            self._next_plain_s = time.monotonic() + PLAIN_INTERVAL_S
            print(lines[-1][:PLAIN_WIDTH], flush=True)

    @staticmethod
    def _line(server: Server) -> str:
        if server.ready_after_s is not None:
            return f"{server.name:<7} {server.ready_after_s:4.0f} s  ready on port {server.port}"
        return f"{server.name:<7} {server.elapsed_s:4.0f} s  {server.last_log_line()}"


class TurnView:
    """The table of turns. It is drawn between requests only, so that it costs them nothing."""

    def __init__(self, console: Console, sides: Sequence[str]) -> None:
        self._console = console
        self._sides = sides
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible")
        self._rows: list[Row] = []

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        else:
            print(plain_head(self._sides), flush=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.note("")
        self._live.stop()

    def note(self, text: str) -> None:
        """Say below the table what happens now."""
        if self._console.is_terminal:
            table = make_table(self._sides, self._rows, text, self._console.width)
            self._live.update(table, refresh=True)

    def add(self, row: Row) -> None:
        """Show one more turn."""
        self._rows.append(row)
        if not self._console.is_terminal:
            print(plain_row(row), flush=True)
