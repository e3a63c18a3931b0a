# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-stateful explain URL [REQUEST]``: why a turn computed what it computed."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any
from urllib.parse import quote

from vllm_stateful.cli.client import ServerClient, ServerError, add_options
from vllm_stateful.session.sentences import explained


def add_command(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("explain", help="why a turn computed what it computed")
    add_options(parser)
    parser.add_argument("request", nargs="?", help="the id of its answer. Default: the last turns.")
    parser.add_argument("--session", help="only turns of this session")
    parser.add_argument("--limit", type=int, default=5, help="turns that are shown. Default: 5.")
    parser.add_argument("--json", action="store_true", help="what the server answers, as it is")
    parser.set_defaults(run=run, takes_others=False)


def run(options: argparse.Namespace, _: list[str]) -> int:
    """Print the turns, the newest first; returns 1 if the server did not answer, else 0."""
    try:
        turns = _turns(ServerClient(options), options)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(turns, indent=2))
        return 0
    if not turns:
        print("No turn is remembered.")
    for turn in turns:
        print(f"{turn['request_id']} (session {turn['session_id']})")
        print("".join(f"  {sentence}\n" for sentence in explained(turn)))
    return 0


def _turns(server: ServerClient, options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.request is not None:
        return [server.get(f"turns/{quote(options.request, safe='')}")]
    path = "turns" if options.session is None else f"sessions/{quote(options.session)}/turns"
    return list(server.get(path, limit=options.limit)["turns"])
