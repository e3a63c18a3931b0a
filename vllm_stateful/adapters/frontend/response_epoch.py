# SPDX-License-Identifier: Apache-2.0
"""With several API servers: says whether the answers that one of them remembers still hold.

An engine core counts the calls after which it may answer differently (new weights, another adapter,
an emptied cache), whichever API server made them. Such a call returns to its caller only after it
was counted. If an answer is made and given out under the same count, it is what the engine would
say now. So a client that knows that a call has returned never gets an answer from before the call.
"""

from __future__ import annotations

from typing import Any

from vllm_stateful.transport.wire import EPOCH


class Epochs:
    """Reads and raises, in an API server, the count of its client's one engine core.

    Args:
        client: an ``AsyncMPClient``.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self.is_shared = getattr(client, "client_count", 1) > 1
        """Whether other API servers speak to the engine core."""
        self.last: int | None = None
        """The count as it was last heard; None where something has happened since."""

    async def ask(self) -> int:
        """Ask for the count.

        Raises:
            Exception: any error of the engine, or of the connection to it.
        """
        engine = self._client.core_engine
        answer = await self._client._call_utility_async("stateful", EPOCH, {}, engine=engine)
        return int(answer[EPOCH])

    async def begin(self, engine: Any) -> None:
        """Raise the count by one.

        Raises:
            Exception: as for ``ask``.
        """
        await self._client._call_utility_async("stateful", EPOCH, {"begins": True}, engine=engine)
