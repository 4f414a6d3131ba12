"""The actor: a bounded mailbox and one consumer task.

A subclass implements `handle_batch`, which gets everything that arrived since it last looked, so that one decision,
one write and one fsync can serve many messages. A full mailbox makes `post` raise `Overloaded`; nothing grows without
a limit.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from tx_async.errors import Overloaded

Message = TypeVar("Message")


class Mailbox(Generic[Message]):
    """A bounded queue whose consumer takes everything at once."""

    def __init__(self, messages_max: int):
        self.messages_max = messages_max
        #: waiting messages, oldest first
        self._messages: deque[Message] = deque()
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._messages)

    def post(self, message: Message) -> None:
        """Deliver now, from the event loop's own thread."""
        if len(self._messages) >= self.messages_max:
            raise Overloaded()
        self._messages.append(message)
        self._arrived.set()

    async def take(self, batch_max: int | None = None) -> list[Message]:
        """Wait for at least one message and take all of them (at most `batch_max`)."""
        while not self._messages:
            self._arrived.clear()
            await self._arrived.wait()
        if batch_max is None or len(self._messages) <= batch_max:
            batch = list(self._messages)
            self._messages.clear()
        else:
            batch = [self._messages.popleft() for _ in range(batch_max)]
        return batch
