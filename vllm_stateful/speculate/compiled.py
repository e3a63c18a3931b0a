# SPDX-License-Identifier: Apache-2.0
"""Functions compiled by numba, which vLLM brings along."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compile a function when it is first called, once per machine where that can be remembered.

    Numba refuses to cache where no folder can be written (a read-only image): then it is compiled
    in each process, in about a second.
    """
    try:
        return cast(F, njit(cache=True, nogil=True)(function))
    except RuntimeError:
        return cast(F, njit(nogil=True)(function))
