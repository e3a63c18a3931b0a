# SPDX-License-Identifier: Apache-2.0
"""``GET /stateful``: one static page that shows what ``/v1/sessions`` and ``/v1/turns`` answer.

The page holds no data, so anyone may load it. It asks the routes for the data, with the key that
its reader types. The routes check that key as always.
"""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from functools import cache
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

page_router = APIRouter()

_HEADERS = {
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@page_router.get("/stateful", include_in_schema=False)
async def show_page() -> Response:
    """The page; its policy lets a browser run only the page's own script and style."""
    text = page_text()
    headers = {**_HEADERS, "Content-Security-Policy": _policy(text)}
    return Response(text, media_type="text/html; charset=utf-8", headers=headers)


@cache
def page_text() -> str:
    """The text of ``page.html``, which lies beside this file."""
    return resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")


@cache
def _policy(text: str) -> str:
    """The policy: a browser may use only the script and style in the text, and this server."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(text, 'script')}",
            f"style-src {_hashes(text, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hashes(text: str, element: str) -> str:
    found = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    digests = (hashlib.sha256(inside.encode()).digest() for inside in found)
    return " ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in digests)
