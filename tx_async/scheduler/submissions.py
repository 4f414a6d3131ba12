"""Turns an operation into a request: it is recognised as a retry, refused, or new, with all that must be durable before
its client hears of it. There is no I/O here: `acceptance.py` commits.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from tx_async.errors import Conflict, SessionGone, UnknownModel, UnknownSampler, UnknownSession, UserError
from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.core.facts import RequestAccepted
from tx_async.scheduler.core.state import SchedulerState
from tx_async.scheduler.quota import Quota
from tx_async.scheduler.sampling.recordings import needed
from tx_async.scheduler.training.lanes import FORWARD
from tx_async.wire import ids, results
from tx_async.wire.operations import (
    CreateModel,
    CreateModelFromCheckpoint,
    Encoded,
    ForwardBackward,
    Operation,
    Rejected,
    Sample,
    UnloadModel,
    encode,
)
from tx_async.wire.records import Change, ModelRecord, Put, RequestRecord, ResultRecord, SessionRecord
from tx_async.wire.results import Failure
from tx_async.wire.worker import AdapterConfig

UNLOAD_SEQ_ID = -1
"""unload_model carries no seq_id: a second one is a retry of the first."""


class Submission(Struct, frozen=True):
    """A new request whose commit is on its way."""

    accepted: RequestAccepted
    """The fact that the state is told when it is durable."""
    body: bytes

    @property
    def request(self) -> RequestRecord:
        return self.accepted.request

    @property
    def changes(self) -> tuple[Change, ...]:
        """One commit: all of it or nothing."""
        fact = self.accepted
        records = [Put(record) for record in (fact.model, fact.result) if record is not None]
        has_ended = fact.result is not None
        return (*records, Put(fact.request, None if has_ended else self.body), *fact.events)

    def with_operation(self, operation: Operation) -> Submission:
        """The same request with its operation completed. Its digest stays that of the client's body."""
        body = encode(operation)
        request = replace(self.request, kind=kind_of(operation), body_bytes=len(body))
        return replace(self, accepted=replace(self.accepted, request=request, operation=operation), body=body)

    def rejected(self, message: str) -> Submission:
        request = self.request
        return self.with_operation(
            Rejected(model_id=request.subject, seq_id=request.seq_id, kind=request.kind, message=message)
        )


class Submissions:
    """Reads the state, and changes only its own two books: the submissions on their way, and the quota."""

    def __init__(self, state: SchedulerState, quota: Quota, new_id: Callable[[str], str] = ids.new_id):
        self.state = state
        self.catalog = state.catalog
        self.quota = quota
        self._new_id = new_id
        #: (subject, seq_id) -> submissions whose commit is on its way
        self._coming: dict[tuple[str, int], Submission] = {}

    def is_new(self, operation: Operation) -> bool:
        """Whether it would be accepted as a new request, not as the repetition of an earlier one."""
        key = key_of(operation)
        return key not in self._coming and self.catalog.find_request(*key) is None

    def submit(
        self, owner: str, operation: Operation, now: float, encoded: Encoded | None = None
    ) -> RequestRecord | Submission:
        """The request that this key has already, or the submission that is on its way to become it.

        Raises `Conflict` for another body under the same key or a turn that has passed, `Overloaded`.
        """
        key = key_of(operation)
        encoded = encoded or Encoded.of(operation)
        body, digest = encoded.body, encoded.digest
        if known := self.catalog.find_request(*key):
            return same(known, digest)
        if coming := self._coming.get(key):
            same(coming.request, digest)
            return coming
        request = self._new_request(owner, operation, key, encoded, now)
        self.quota.check(request)
        submission = Submission(self._audited(self._accepted(request, operation, now), now), body)
        if submission.accepted.model is not None:
            self.quota.check_record(self.catalog.holdings, submission.accepted.model)
        self.quota.take(request)
        self._coming[key] = submission
        return submission

    def durable(self, submission: Submission) -> RequestAccepted:
        """Its commit has succeeded: -> the fact that the state must be told at once."""
        del self._coming[submission.request.subject, submission.request.seq_id]
        return submission.accepted

    def failed(self, submission: Submission) -> None:
        """Its commit has failed: nothing happened, and its key is free again."""
        del self._coming[submission.request.subject, submission.request.seq_id]
        self.quota.give_back(submission.request.request_id)

    def recordings_of(self, operation: ForwardBackward) -> list[str]:
        """The recorded sequences that a batch names. Raises `InvalidRequest` for one that its run cannot train on."""
        model = self.catalog.models.get(operation.model_id)
        return list(needed(operation, model, self.catalog.recordings.get)) if model else []

    def _new_request(
        self, owner: str, operation: Operation, key: tuple[str, int], encoded: Encoded, now: float
    ) -> RequestRecord:
        """Raises `Conflict`, `InvalidRequest`: see `SchedulerState.check_turn`."""
        subject, seq_id = key
        self.state.check_turn(subject, seq_id)
        num_samples = operation.num_samples if isinstance(operation, Sample) else 0
        return RequestRecord(
            request_id=self._new_id("r"),
            owner=owner,
            kind=kind_of(operation),
            subject=subject,
            seq_id=seq_id,
            body_digest=encoded.digest,
            body_bytes=len(encoded.body),
            created_at=now,
            sample_sequence_ids=tuple(f"{subject}:{seq_id}:{i}" for i in range(num_samples)),
        )

    # ---- operations that create a training run

    def _accepted(self, request: RequestRecord, operation: Operation, now: float) -> RequestAccepted:
        match operation:
            case CreateModel():
                return self._create_model(request, operation, now)
            case CreateModelFromCheckpoint():
                return self._create_model_from_checkpoint(request, operation, now)
            case _:
                return RequestAccepted(request, operation)

    def _audited(self, fact: RequestAccepted, now: float) -> RequestAccepted:
        if fact.model is None:
            return fact
        run = Put(fact.model)
        _, *events = self.state.decisions.audit.audited([run], now)
        return replace(fact, events=tuple(events))

    def _create_model(self, request: RequestRecord, operation: CreateModel, now: float) -> RequestAccepted:
        """Create a run without a device: its adapter is made from its seed when it is first used."""
        model = self._new_model(request, operation, operation.lora, now)
        body = results.encode_json({"type": "create_model", "model_id": model.model_id})
        result = ResultRecord(request_id=request.request_id, finished_at=now, content="json", payload=body)
        return RequestAccepted(request, operation, model, result)

    def _create_model_from_checkpoint(
        self, request: RequestRecord, operation: CreateModelFromCheckpoint, now: float
    ) -> RequestAccepted:
        try:
            checkpoint = self.catalog.find_checkpoint(request.owner, operation.path, operation.optimizer)
        except UserError as error:
            payload = results.encode_json(Failure.of(error))
            result = ResultRecord(request_id=request.request_id, finished_at=now, content="error", payload=payload)
            return RequestAccepted(request, operation, result=result)
        model = replace(
            self._new_model(request, operation, checkpoint.lora, now),
            created_from=checkpoint.storage_key,
            created_from_path=checkpoint.path,
            created_with_optimizer=operation.optimizer,
        )
        return RequestAccepted(request, operation, model)

    def _new_model(
        self,
        request: RequestRecord,
        operation: CreateModel | CreateModelFromCheckpoint,
        lora: AdapterConfig,
        now: float,
    ) -> ModelRecord:
        return ModelRecord(
            model_id=operation.model_id,
            session_id=operation.session_id,
            owner=request.owner,
            base_model=self.state.base_model.name,
            base_fingerprint=self.catalog.base_fingerprint,
            lora=lora,
            created_at=now,
            user_metadata=operation.user_metadata,
            last_request_at=now,
        )


def key_of(operation: Operation) -> tuple[str, int]:
    """(subject, seq_id): two submissions with the same key are the same (`schemas/tinker.md`, "Retries")."""
    match operation:
        case CreateModel() | CreateModelFromCheckpoint():
            return operation.model_id, 0
        case UnloadModel():
            return operation.model_id, UNLOAD_SEQ_ID
        case Sample():
            return operation.sampling_session_id, operation.seq_id
        case _:
            return operation.model_id, operation.seq_id


def kind_of(operation: Operation) -> str:
    if isinstance(operation, ForwardBackward) and operation.forward_only:
        return FORWARD
    return type(operation).__name__


def same(request: RequestRecord, digest: str) -> RequestRecord:
    """The first request of a key, for a repetition of it. Raises `Conflict` when the repetition has another body."""
    if request.body_digest != digest:
        raise Conflict(
            f"seq_id {request.seq_id} was used before with another body. Use the next seq_id for a new request."
        )
    return request


def session_of(catalog: Catalog, owner: str, operation: Operation) -> SessionRecord | None:
    """The operation's session, unless it was forgotten. A session of somebody else does not exist.

    Raises `UnknownSession`, `UnknownSampler`, `UnknownModel`, `SessionGone`.
    """
    match operation:
        case CreateModel() | CreateModelFromCheckpoint():
            session = catalog.sessions.get(operation.session_id)
            if session is None or session.owner != owner:
                raise UnknownSession()
            if session.status not in ("active", "expired"):
                raise SessionGone()
            return session
        case Sample():
            sampler = catalog.samplers.get(operation.sampling_session_id)
            if sampler is None or sampler.owner != owner:
                raise UnknownSampler()
            return catalog.sessions.get(sampler.session_id)
        case _:
            model = catalog.models.get(operation.model_id)
            if model is None or model.owner != owner or model.status == "copy":
                raise UnknownModel()
            return catalog.sessions.get(model.session_id)
