# SPDX-License-Identifier: Apache-2.0
"""Room for the frames of Python functions.

CPython 3.11 to 3.13 keeps them in blocks of 16 KiB. A call that crosses the end of a block asks the
operating system for another one, and gives it back as it returns: some 2 to 10 us, for each such
call. Where frames reach the end of a block depends on how deep they are nested, and a recursion
over what a client sent can be made to cross it at each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

Args = ParamSpec("Args")
Made = TypeVar("Made")


def with_room(work: Callable[Args, Made], *args: Args.args, **kwargs: Args.kwargs) -> Made:
    """Call a function in a block of its own, of 1 MiB, in which the default recursion limit fits.

    Takes some 10 us, and as much memory as is used.
    """
    return work(*args, **kwargs)


# A frame of a little more than half a block: the block is as large as the next power of two.
with_room.__code__ = with_room.__code__.replace(co_stacksize=70_000)
