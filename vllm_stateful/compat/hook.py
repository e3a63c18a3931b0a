# SPDX-License-Identifier: Apache-2.0
"""What a patch calls: a function of ours, by name, imported when it is first called."""

import importlib
from collections.abc import Callable
from typing import Any


class Hook:
    """A function that is known by its name until it is needed.

    So the list of patches loads no adapter, and a process loads only those that run there. What the
    function raises reaches vLLM's caller unchanged: a function that must not fail a request has to
    catch its own errors. Safe to call from any thread.

    Args:
        target: ``package.module:function``.
    """

    __slots__ = ("_function", "target")

    def __init__(self, target: str) -> None:
        self.target = target
        self._function: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; a coroutine function's result is to be awaited."""
        return (self._function or self.load())(*args, **kwargs)

    def load(self) -> Callable[..., Any]:
        """Import the function.

        Raises:
            ImportError: there is no such module.
            AttributeError: it has no such function.
        """
        module, _, name = self.target.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        self._function = function
        return function

    def set(self, function: Callable[..., Any]) -> None:
        """Have another function called, in a test."""
        self._function = function

    def clear(self) -> None:
        """Back to the function that the name says."""
        self._function = None

    def __repr__(self) -> str:
        return f"Hook({self.target!r})"
