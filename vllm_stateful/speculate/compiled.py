# SPDX-License-Identifier: Apache-2.0
"""Compiles functions with numba, which is installed with vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compile a function when it is first called, and cache the result on disk if possible.

    Numba refuses to cache when no folder is writable (a read-only image). The function is then
    compiled in each process, which takes about a second.
    """
    try:
        return cast(F, njit(cache=True, nogil=True)(function))
    except RuntimeError:
        return cast(F, njit(nogil=True)(function))
