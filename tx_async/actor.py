"""What an actor is in this project: the one owner of some live state, for as long as the server runs.

- Nobody else writes its state. Others call its plain methods on the event loop's thread. These never await, so nobody
  ever sees a half-made decision: they tell it a fact (`Scheduler.tell`, `Performer.handle`) or leave work in its inbox
  (`Journal.append`, `Outbox.post`).
- `run` is its one task, started and cancelled by `running`. It raises when an invariant is broken or the actor can
  never go on; that ends every other actor, and with them the process. The journal brings the process back.

| actor | owns | what arrives | what its task does |
| --- | --- | --- | --- |
| `scheduler` | the live state of requests, models, sessions and workers | facts of workers, calls of the API | ticks |
| `performer` | instructions that are being carried out | facts, handled one at a time | runs the outbox |
| `outbox` | what is decided and not yet durable | `Append`, `Finish` and `DeleteFiles` | commits them in order |
| `journal` | commits that are not durable | changes | fails when the lease is lost |
| `router` | workers' connections and their open commands | frames from sockets | watches leases |
| `supervisor` | local worker processes | their exits | starts them again |
| `identity` | which storage and base model belong to the journal | what workers have loaded | waits for the storage |

Five of them are started by `app.py`. The scheduler starts the performer, and the performer starts the outbox.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import anyio
from anyio.abc import TaskGroup

Message = TypeVar("Message")


class Actor(Protocol):
    name: str
    """Its name in tasks, metrics and log lines."""

    async def run(self) -> None:
        """Run until cancelled. Raises any error after which the actor cannot go on."""
        ...


class Inbox(deque[Message]):
    """Messages that wait for their one consumer, oldest first. The owner bounds their number: it refuses new work, or
    every message follows from work that was accepted within bounds."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Event()
        self._is_closed = False

    def post(self, message: Message) -> None:
        self.append(message)
        self._changed.set()

    def close(self) -> None:
        """Declare that nothing more will be posted."""
        self._is_closed = True
        self._changed.set()

    async def wait(self) -> bool:
        """Wait for a message; then True. False once the inbox is empty and closed."""
        while not self and not self._is_closed:
            self._changed.clear()
            await self._changed.wait()
        return bool(self)


@asynccontextmanager
async def running(*actors: Actor) -> AsyncIterator[TaskGroup]:
    """Run all actors while the context is open. When one fails, the others are cancelled and the context raises."""
    async with anyio.create_task_group() as group:
        for actor in actors:
            group.start_soon(actor.run, name=actor.name)
        yield group
        group.cancel_scope.cancel()
