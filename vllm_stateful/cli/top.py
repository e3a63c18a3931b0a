# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-stateful top URL``: a server's sessions, and its turns as they come."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from vllm_stateful.cli.client import ServerClient, ServerError, add_options
from vllm_stateful.session.sentences import reason, seconds


def add_command(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("top", help="sessions and turns of a server, as they come")
    add_options(parser)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two looks")
    parser.add_argument("--rows", type=int, default=15, help="rows of each table")
    parser.add_argument("--once", action="store_true", help="look once and end")
    parser.set_defaults(run=run, takes_others=False)


def run(options: argparse.Namespace, _: list[str]) -> int:
    """Show the tables until the user ends it; returns 1 if the server did not answer, else 0."""
    from rich.console import Console
    from rich.live import Live

    console, server = Console(), ServerClient(options)
    try:
        if options.once:
            console.print(screen(server, options.rows))
            return 0
        with Live(screen(server, options.rows), console=console, screen=True) as live:
            while True:
                time.sleep(options.every)
                live.update(screen(server, options.rows))
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def screen(server: ServerClient, rows: int) -> Any:
    """Both tables, as a renderable of ``rich``."""
    from rich.console import Group

    sessions = server.get("sessions", limit=rows)["sessions"]
    turns = server.get("turns", limit=rows)["turns"]
    return Group(_sessions(sessions), _turns(turns))


def _sessions(sessions: list[dict[str, Any]]) -> Any:
    table = _table("Sessions", ("session", "state", "turns", "tokens", "blocks", "points", "idle"))
    for each in sessions:
        state = each["state"].replace("_", " ")
        if each["waits_for"]:
            state = f"waits for {each['waits_for']}"
        if each["demoted"] and not each["blocks"]:
            state += f" (given back: {each['demoted']})"
        counts = (f"{each[name]:,}" for name in ("turns", "tokens", "blocks", "resume_points"))
        table.add_row(each["session_id"], state, *counts, seconds(each["idle_s"]))
    return table


def _turns(turns: list[dict[str, Any]]) -> Any:
    head = ("session", "outcome", "prompt", "reused", "computed", "first token", "why not more")
    table = _table("Turns", head)
    for each in turns:
        first = each["first_token_s"]
        counts = (f"{each[name]:,}" for name in ("prompt_tokens", "reused_tokens"))
        table.add_row(
            each["session_id"],
            each["outcome"],
            *counts,
            f"{each['computed_tokens']:,}",
            "" if first is None else seconds(first),
            "" if each["missed"]["cause"] == "none" else reason(each["missed"]),
        )
    return table


def _table(title: str, columns: tuple[str, ...]) -> Any:
    from rich.table import Table

    table = Table(title=title, expand=True, title_justify="left")
    for name in columns:
        is_text = name in ("session", "state", "outcome", "why not more")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name == "outcome")
    return table
