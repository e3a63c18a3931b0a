# SPDX-License-Identifier: Apache-2.0
"""The opening that a patch makes in vLLM: one slot for one function."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Hook(Generic[F]):
    """A slot that an adapter fills. While it is empty, the patch behaves like stock vLLM.

    What the function raises reaches vLLM's caller unchanged: a hook that must not fail a
    request has to catch its own errors. Safe to read from any thread (one attribute).
    """

    __slots__ = ("_fn", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._fn: F | None = None

    @property
    def fn(self) -> F | None:
        """The function in the slot, or None."""
        return self._fn

    def set(self, fn: F) -> None:
        """Fill the slot. A second call replaces the function, so that set-up can run twice."""
        self._fn = fn

    def clear(self) -> None:
        """Empty the slot: back to stock behaviour."""
        self._fn = None

    def __repr__(self) -> str:
        return f"Hook({self.name!r}, fn={self._fn!r})"
