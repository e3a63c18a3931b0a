# SPDX-License-Identifier: Apache-2.0
"""A function of ours that a patch calls. It is imported by its name when it is first called."""

import importlib
from collections.abc import Callable
from typing import Any


class Hook:
    """A function that is only a name until it is needed.

    So importing the list of patches loads no adapter, and a process loads only the adapters that
    run in it. An error of the function reaches vLLM's caller unchanged. A function that must not
    fail a request has to catch its own errors. Safe to call from any thread.

    Args:
        target: ``package.module:function``.
    """

    __slots__ = ("_function", "target")

    def __init__(self, target: str) -> None:
        self.target = target
        self._function: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function. The result of a coroutine function must be awaited."""
        return (self._function or self.load())(*args, **kwargs)

    def load(self) -> Callable[..., Any]:
        """Import the function.

        Raises:
            ImportError: there is no such module.
            AttributeError: the module has no such function.
        """
        module, _, name = self.target.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        self._function = function
        return function

    def set(self, function: Callable[..., Any]) -> None:
        """Replace the function, in a test."""
        self._function = function

    def clear(self) -> None:
        """Return to the function that the name refers to."""
        self._function = None

    def __repr__(self) -> str:
        return f"Hook({self.target!r})"
