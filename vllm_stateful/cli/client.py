# SPDX-License-Identifier: Apache-2.0
"""Asks a running server for the commands. ``httpx`` and ``rich`` come with vLLM."""

from __future__ import annotations

import argparse
import os
from typing import Any

KEY_ENV = "OPENAI_API_KEY"


class ServerError(Exception):
    """The server did not answer the question. The text says why, in one line."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that asks a server."""
    parser.add_argument("url", help="of the server, for example http://localhost:8000")
    parser.add_argument(
        "--api-key",
        default=os.environ.get(KEY_ENV, ""),
        help=f"whose sessions are shown; the operator's key shows all. Default: {KEY_ENV}.",
    )
    parser.add_argument(
        "--salt", default=None, help="the cache_salt that the sessions' requests have"
    )


class ServerClient:
    """A running server, as one client sees it.

    Args:
        options: the parsed options that `add_options` added.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        import httpx

        key = options.api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url = options.url.rstrip("/").removesuffix("/v1")
        self._salt = options.salt
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=30)
        self._failed = httpx.HTTPError, httpx.InvalidURL

    def get(self, path: str, **parameters: Any) -> Any:
        """The answer of ``/v1/PATH``.

        Raises:
            ServerError: the server did not answer, or answered with an error.
        """
        if self._salt is not None:
            parameters["cache_salt"] = self._salt
        try:
            answer = self._client.get(f"/v1/{path}", params=parameters)
        except self._failed as error:
            raise ServerError(f"{self.url}: {error}") from None
        if answer.status_code != 200:
            raise ServerError(f"{self.url}/v1/{path}: {_reason(answer)}")
        return answer.json()


def _reason(answer: Any) -> str:
    """The reason of an error: vLLM's message, or the HTTP status."""
    try:
        said = answer.json()
    except ValueError:
        said = None
    error = said.get("error") if isinstance(said, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or f"{answer.status_code} {answer.reason_phrase}")
