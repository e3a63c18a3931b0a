# SPDX-License-Identifier: Apache-2.0
"""The sessions' side of vLLM's CPU offload tier (``OffloadingConnector``).

vLLM stores every full block of a prompt on the host as soon as it is computed. Before a turn is
scheduled, vLLM loads what the GPU has lost. We add two things: the tier gives up chunks in the
order of the sessions (``adapters.offload_policy``), and a session that is not worth its place is
not stored. If the tier has further tiers behind its memory, for example files, every session is
stored: its way there leads through the memory.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.request import Request

from vllm_stateful.adapters.offload_policy import StatefulCachePolicy
from vllm_stateful.prefix.residency import is_anonymous
from vllm_stateful.schedule.gaps import Forecast, GapModel, Wait, WaitKind
from vllm_stateful.schedule.offload_order import OffloadOrder, Owner, WorkingSet
from vllm_stateful.types import SessionKey

logger = init_logger("vllm.stateful")

MAX_ENDED = 10_000
"""The most ended requests whose session is remembered. The tier asks for it in the next step."""

STORE_NONE = {"max_offload_tokens": 0}
"""``kv_transfer_params`` with vLLM's own parameter for how much of a request is offloaded:
nothing."""


class OffloadTier:
    """What one scheduler tells its offload tier.

    Args:
        policy: the tier's policy.
        tokens_per_chunk: the number of tokens that one chunk holds.
        clock: gives monotonic seconds.
        has_more: whether further tiers lie behind the memory.
    """

    def __init__(
        self,
        policy: StatefulCachePolicy,
        tokens_per_chunk: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        has_more: bool = False,
    ) -> None:
        self._clock = clock
        self._has_more = has_more
        self.order: OffloadOrder[Any] = policy.order
        self.working_set = WorkingSet(policy.cache_capacity * tokens_per_chunk)
        self.num_declined = 0
        self._ended: OrderedDict[str, SessionKey] = OrderedDict()
        self._one_shot = GapModel().forecast(None, Wait(WaitKind.ONE_SHOT))
        policy.owner_of = self._owner_of

    def admit(self, request: Request, session: SessionKey) -> None:
        """Decide whether the KV of a new request goes to the tier, before vLLM's connector does.

        A client's own ``max_offload_tokens`` is left as it is.
        """
        given = request.kv_transfer_params or {}
        if self._has_more or self.working_set.ratio <= 1 or "max_offload_tokens" in given:
            return
        otherwise = self._one_shot if is_anonymous(session) else None
        if not self.order.beats_victim(_owner(session), otherwise):
            request.kv_transfer_params = {**given, **STORE_NONE}
            self.num_declined += 1

    def request_ended(self, request_id: str, session: SessionKey) -> None:
        """Remember the session of an ended request; the tier asks at its next transfers."""
        self._ended[request_id] = session
        while len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    def waits(
        self, session: SessionKey, forecast: Forecast, num_tokens: int, wished_until_s: float
    ) -> None:
        """Note that a session with ``num_tokens`` of context waits; see ``OffloadOrder.waits``."""
        self.working_set.waits(session, num_tokens, forecast.returns, self._clock())
        self.order.waits(_owner(session), forecast, wished_until_s)

    def closed(self, session: SessionKey) -> None:
        """Forget a session that was closed."""
        self.working_set.ended(session)
        self.order.ended(_owner(session))

    def _owner_of(self, request_id: str) -> Owner:
        session = self._ended.pop(request_id, None)
        return Owner(("request", request_id)) if session is None else _owner(session)


def _owner(session: SessionKey) -> Owner:
    return Owner(session, session.identity.tenant, session.identity.cache_salt)


def tier_of(connectors: Sequence[Any]) -> OffloadTier | None:
    """The tier of a just built ``OffloadingConnector``; None when another policy runs it.

    Of several connectors, it is the last one that asked for our policy: the others know no
    sessions.
    """
    policy = StatefulCachePolicy.take_newest()
    if policy is None:
        logger.info(
            "stateful: the offload tier keeps vLLM's own eviction policy; "
            "docs/offload.md says how to let it know sessions"
        )
        return None
    name = StatefulCachePolicy.__name__
    ours = [each for each in connectors if _option(each, "eviction_policy") == name]
    connector = (ours or connectors)[-1]
    has_more = bool(_option(connector, "secondary_tiers"))
    return OffloadTier(policy, _tokens_per_chunk(connector), has_more=has_more)


def _tokens_per_chunk(connector: Any) -> int:
    """How many tokens of context one chunk of the tier holds, over all groups together.

    Each group that attends to everything stores a chunk of its own. Windows and states store little
    in comparison. They are counted only if there is no other group.
    """
    groups = connector.scheduler.config.kv_group_configs
    whole = [group for group in groups if group.sliding_window_size_in_chunks is None] or groups
    return int(1 / sum(1 / group.tokens_per_chunk for group in whole))


def _option(connector: Any, name: str) -> Any:
    return connector._kv_transfer_config.get_from_extra_config(name, None)
