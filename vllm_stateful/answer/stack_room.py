# SPDX-License-Identifier: Apache-2.0
"""Runs a recursive function in a large block of stack frames, so that its calls stay cheap.

CPython 3.11 to 3.13 keeps the frames of Python functions in blocks of 16 KiB. A call that crosses
the end of a block gets another block from the operating system and gives it back when it returns.
Each such call takes some 2 to 10 us. Which calls cross the end of a block depends on how deep they
are nested, and a client can send data for which a recursion crosses it at each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

Args = ParamSpec("Args")
Made = TypeVar("Made")


def with_room(work: Callable[Args, Made], *args: Args.args, **kwargs: Args.kwargs) -> Made:
    """Call a function in a block of frames of its own, of 1 MiB.

    Calls up to the default recursion limit fit in it. Takes some 10 us, and only as much memory as
    the frames use.
    """
    return work(*args, **kwargs)


# This makes the function's frame a little larger than half a MiB. A block is as large as the next
# power of two, so it has 1 MiB.
with_room.__code__ = with_room.__code__.replace(co_stacksize=70_000)
