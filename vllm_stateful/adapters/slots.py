# SPDX-License-Identifier: Apache-2.0
"""What the plugin keeps on two of vLLM's objects: one typed slot on each, named ``stateful``.

`OnRequest` is attached to vLLM's scheduler-side ``Request``, inside the engine core. `OnStep` is
attached to its ``SchedulerOutput``, which goes from the engine core to the workers. It is pickled
if the workers are processes of their own.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_stateful.session.turn_record import NOTHING_SAID, Said
from vllm_stateful.types import TokenArray

if TYPE_CHECKING:
    from vllm_stateful.attention.shared_prefixes import SharedKeys
    from vllm_stateful.prefix.residency import PromptBase
    from vllm_stateful.schedule.service_order import Ticket
    from vllm_stateful.speculate.answer_buffer import LookupUpdate

SLOT = "stateful"


@dataclass(slots=True)
class OnRequest:
    """What is known of one request.

    Attributes:
        prompt: its prompt, int32, shape ``[num_tokens]``; None if it came without a header.
        version: the name by which later prompts refer to this prompt; None if it has none.
        base: the prompt to which this one refers, and how much both share; None without one.
        is_array_sent: whether the workers may get ``prompt`` in place of the list.
        ticket: its place in the waiting queue, with ``--stateful-order least-served``.
        num_sampled: tokens that the last processed step sampled; 0 before the first step.
        is_cut: whether a stop took some of these tokens back.
        said: what its client said of the turn.
        num_steps: steps that are scheduled and not processed yet. Counted until the request ends,
            and only for models with recurrent states and drafts.
    """

    prompt: TokenArray | None = None
    version: Hashable | None = None
    base: PromptBase | None = None
    is_array_sent: bool = False
    ticket: Ticket | None = None
    num_sampled: int = 0
    is_cut: bool = False
    num_steps: int = 0
    said: Said = NOTHING_SAID


@dataclass(slots=True)
class OnStep:
    """What one step takes to the workers.

    Attributes:
        lookup: changes to what the device looks drafts up in; None if there are none.
        is_beside_head: whether the engine core keeps sessions that draft beside a head.
        shared: which requests share leading keys.
        ends: token ids behind which a step samples nothing. Sent only with the first step.
    """

    lookup: LookupUpdate | None = None
    is_beside_head: bool = False
    shared: tuple[SharedKeys, ...] = ()
    ends: tuple[int, ...] = ()


NO_REQUEST = OnRequest()
NO_STEP = OnStep()


def on_request(request: Any) -> OnRequest:
    """The slot of a request, to write to. Created if there is none."""
    found: OnRequest | None = getattr(request, SLOT, None)
    if found is None:
        found = OnRequest()
        setattr(request, SLOT, found)
    return found


def of_request(request: Any) -> OnRequest:
    """The slot of a request, only to read."""
    found: OnRequest = getattr(request, SLOT, NO_REQUEST)
    return found


def on_step(output: Any) -> OnStep:
    """The slot of a step, to write to. Created if there is none."""
    found: OnStep | None = getattr(output, SLOT, None)
    if found is None:
        found = OnStep()
        setattr(output, SLOT, found)
    return found


def of_step(output: Any) -> OnStep:
    """The slot of a step, only to read."""
    found: OnStep = getattr(output, SLOT, NO_STEP)
    return found
