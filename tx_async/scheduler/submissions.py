"""What a submission is before it is accepted: whose it is, which earlier one it repeats, the record that it gets."""

from __future__ import annotations

from tx_async.errors import Conflict, InvalidRequest, SessionGone, UnknownModel, UnknownSampler, UnknownSession
from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.training.lanes import FORWARD
from tx_async.scheduler.training.runs import Runs
from tx_async.wire.operations import (
    CreateModel,
    CreateModelFromCheckpoint,
    ForwardBackward,
    Operation,
    Sample,
    UnloadModel,
)
from tx_async.wire.records import RequestRecord, SessionRecord

UNLOAD_SEQ_ID = -1
"""unload_model carries no seq_id; a second one is the first one's retry."""


def key_of(operation: Operation) -> tuple[str, int]:
    """(subject, seq_id): what makes two submissions the same (sections 0.5 and 3.7 of the wire contract)."""
    match operation:
        case CreateModel() | CreateModelFromCheckpoint():
            return operation.model_id, 0
        case UnloadModel():
            return operation.model_id, UNLOAD_SEQ_ID
        case Sample():
            return operation.sampling_session_id, operation.seq_id
        case _:
            return operation.model_id, operation.seq_id


def session_of(catalog: Catalog, owner: str, operation: Operation) -> SessionRecord | None:
    """The operation's session, unless that was forgotten. What belongs to somebody else does not exist.

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


def same(request: RequestRecord, digest: str) -> RequestRecord:
    """The first request of a key, for its repetition. Raises `Conflict` when that has another body."""
    if request.body_digest != digest:
        raise Conflict(
            f"seq_id {request.seq_id} was used before with another body. Use the next seq_id for a new request."
        )
    return request


def new_request(
    runs: Runs, request_id: str, owner: str, operation: Operation, digest: str, num_bytes: int, now: float
) -> RequestRecord:
    """Raises `Conflict` when the operation's turn has passed, `InvalidRequest` when its number cannot be the next."""
    subject, seq_id = key_of(operation)
    lane = runs.lanes.get(subject)
    if lane is not None and lane.is_used_up(seq_id):
        raise Conflict(f"seq_id {seq_id} of {subject} is used up: its turn has passed. Use the next seq_id.")
    if lane is not None and seq_id - lane.newest_seq_id > runs.policy.seq_ahead_max:
        raise InvalidRequest(
            f"seq_id {seq_id} is too far ahead: {subject} has accepted up to {lane.newest_seq_id}, and at most "
            f"{runs.policy.seq_ahead_max} beyond that are allowed (`seq_ahead_max`). Use the next seq_id."
        )
    num_samples = operation.num_samples if isinstance(operation, Sample) else 0
    return RequestRecord(
        request_id=request_id,
        owner=owner,
        kind=kind_of(operation),
        subject=subject,
        seq_id=seq_id,
        body_digest=digest,
        body_bytes=num_bytes,
        created_at=now,
        sample_sequence_ids=tuple(f"{subject}:{seq_id}:{i}" for i in range(num_samples)),
    )


def kind_of(operation: Operation) -> str:
    if isinstance(operation, ForwardBackward) and operation.forward_only:
        return FORWARD
    return type(operation).__name__
