"""From a submission to an accepted request: once for each key, durable before the client hears of it.

A crash before the commit: the client tries again. After it: recovery finds the request and runs it.
"""

from __future__ import annotations

import asyncio

import msgspec

from tx_async.clock import Clock
from tx_async.errors import Overloaded, StorageError, UserError
from tx_async.journal.journal import Journal
from tx_async.scheduler import submissions
from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.core.events import RequestAccepted
from tx_async.scheduler.core.state import SchedulerState
from tx_async.scheduler.performer import Performer
from tx_async.scheduler.quota import Quota
from tx_async.wire import ids, operations, results
from tx_async.wire.operations import CreateModel, CreateModelFromCheckpoint, Operation
from tx_async.wire.records import Change, ModelRecord, Put, RequestRecord, ResultRecord
from tx_async.wire.results import Failure
from tx_async.wire.worker import AdapterConfig


class Accepting(msgspec.Struct, frozen=True):
    """A submission whose commit is on its way."""

    request: RequestRecord
    task: asyncio.Task[None]


class Acceptance:
    def __init__(self, state: SchedulerState, journal: Journal, performer: Performer, quota: Quota, clock: Clock):
        self.state = state
        self.catalog: Catalog = state.catalog
        self.journal = journal
        self.performer = performer
        self.quota = quota
        self.clock = clock
        #: (subject, seq_id) -> submissions whose commit is on its way
        self._accepting: dict[tuple[str, int], Accepting] = {}

    async def submit(self, owner: str, operation: Operation) -> RequestRecord:
        """The request of this key: the first one's. Raises `Conflict`, `Overloaded`, `StorageError`."""
        key = submissions.key_of(operation)
        body = operations.encode(operation)
        digest = operations.body_digest(body)
        if known := self.catalog.find_request(*key):
            return submissions.same(known, digest)
        try:
            accepting = self._accepting.get(key) or self._begin(key, owner, operation, body, digest)
            request = submissions.same(accepting.request, digest)
            # A client that gives up must not take back what may be durable already.
            await asyncio.shield(accepting.task)
        except (Overloaded, StorageError):
            self.state.training.runs.heard_of(key[0], self.clock.now())  # it will come again: its number is not burned
            raise
        return request

    def is_new(self, operation: Operation) -> bool:
        """Whether it would be accepted as a request of its own, not as the repetition of an earlier one."""
        key = submissions.key_of(operation)
        return key not in self._accepting and self.catalog.find_request(*key) is None

    def _begin(self, key: tuple[str, int], owner: str, operation: Operation, body: bytes, digest: str) -> Accepting:
        request = submissions.new_request(
            self.state.training.runs, ids.new_id("r"), owner, operation, digest, len(body), self.clock.now()
        )
        self.quota.check(request)
        self.quota.take(request)
        accepting = Accepting(request, self.performer.spawn(self._accept(request, operation, body)))
        self._accepting[key] = accepting
        accepting.task.add_done_callback(lambda task: self._accepted(key, request, task))
        return accepting

    def _accepted(self, key: tuple[str, int], request: RequestRecord, task: asyncio.Task[None]) -> None:
        del self._accepting[key]
        if task.cancelled() or task.exception() is not None:
            self.quota.give_back(request.request_id)

    async def _accept(self, request: RequestRecord, operation: Operation, body: bytes) -> None:
        match operation:
            case CreateModel():
                await self._create_model(request, operation)
            case CreateModelFromCheckpoint():
                await self._create_model_from_checkpoint(request, operation, body)
            case _:
                await self._commit_new(Put(request, body))
                self.performer.handle(RequestAccepted(request, operation))

    async def _commit_new(self, *changes: Change) -> None:
        """Records under new keys: they exist when they are durable. Raises `StorageError`, `Overloaded`."""
        await self.journal.commit(changes)
        self.catalog.apply(changes)

    async def _create_model(self, request: RequestRecord, operation: CreateModel) -> None:
        """Needs no device: the adapter is made from its seed when it is first used."""
        model = self._new_model(request, operation, operation.lora)
        body = results.encode_json({"type": "create_model", "model_id": model.model_id})
        result = ResultRecord(request_id=request.request_id, finished_at=self.clock.now(), content="json", payload=body)
        await self._commit_new(Put(model), Put(request), Put(result))
        self.state.create_model(model)
        self.performer.publish(result)

    async def _create_model_from_checkpoint(
        self, request: RequestRecord, operation: CreateModelFromCheckpoint, body: bytes
    ) -> None:
        try:
            checkpoint = self.catalog.find_checkpoint(request.owner, operation.path, operation.optimizer)
        except UserError as error:
            payload = results.encode_json(Failure.of(error))
            result = ResultRecord(
                request_id=request.request_id, finished_at=self.clock.now(), content="error", payload=payload
            )
            await self._commit_new(Put(request), Put(result))
            self.performer.publish(result)
            return
        model = msgspec.structs.replace(
            self._new_model(request, operation, checkpoint.lora),
            created_from=checkpoint.storage_key,
            created_from_path=checkpoint.path,
            created_with_optimizer=operation.optimizer,
        )
        await self._commit_new(Put(model), Put(request, body))
        self.state.create_model(model)
        self.performer.handle(RequestAccepted(request, operation))

    def _new_model(
        self, request: RequestRecord, operation: CreateModel | CreateModelFromCheckpoint, lora: AdapterConfig
    ) -> ModelRecord:
        return ModelRecord(
            model_id=operation.model_id,
            session_id=operation.session_id,
            owner=request.owner,
            base_model=self.state.base_model.name,
            base_fingerprint=self.catalog.base_fingerprint,
            lora=lora,
            created_at=self.clock.now(),
            user_metadata=operation.user_metadata,
            last_request_at=self.clock.now(),
        )
