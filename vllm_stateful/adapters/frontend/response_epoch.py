# SPDX-License-Identifier: Apache-2.0
"""With several API servers: whether what one of them remembers still holds.

An engine core counts the calls behind which it may answer otherwise (new weights, another adapter,
an emptied cache), whichever API server made them. Such a call returns to its caller after it was
counted. So an answer that was made and is given out under the same count is what the engine would
say: whoever knows that a call has returned is never answered from before it.
"""

from __future__ import annotations

from typing import Any

from vllm_stateful.transport.wire import EPOCH


class Epochs:
    """In an API server: the count of the one engine core of its client.

    Args:
        client: an ``AsyncMPClient``.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self.is_shared = getattr(client, "client_count", 1) > 1
        """Whether other API servers speak to the engine core."""
        self.last: int | None = None
        """As it was heard last; None where something happened since."""

    async def ask(self) -> int:
        """The count now.

        Raises:
            Exception: what the engine, or the connection to it, says.
        """
        engine = self._client.core_engine
        answer = await self._client._call_utility_async("stateful", EPOCH, {}, engine=engine)
        return int(answer[EPOCH])

    async def begin(self, engine: Any) -> None:
        """Count one more.

        Raises:
            Exception: as ``ask``.
        """
        await self._client._call_utility_async("stateful", EPOCH, {"begins": True}, engine=engine)
