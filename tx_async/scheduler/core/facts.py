"""The facts that the state is told. Those about workers are in `wire/facts.py`, where dispatch can import them.

Every fact has a `cause`: the request, worker command or event behind it. The instructions that follow from a fact carry
its cause, so a log line about any of them says why it happened.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from tx_async.wire.facts import CommandEnded, WorkerLost, WorkerProgress, WorkerReady
from tx_async.wire.operations import Operation, Sample
from tx_async.wire.records import (
    Change,
    CheckpointRecord,
    ModelRecord,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    SessionRecord,
)

# ---- requests


class RequestAccepted(Struct, frozen=True):
    """A new request is durable, with the training run that it creates (if any), and with its result if it ended at
    once."""

    request: RequestRecord
    operation: Operation
    model: ModelRecord | None = None
    result: ResultRecord | None = None
    events: tuple[Change, ...] = ()
    """The audit log's changes."""

    @property
    def cause(self) -> str:
        return self.request.request_id


class LiveRequested(Struct, frozen=True):
    """Somebody waits for samples, token by token. Nothing of such a request is durable."""

    request: RequestRecord
    operation: Sample
    version: str | None
    """Storage key of the adapter; None samples the base model."""

    @property
    def cause(self) -> str:
        return self.request.request_id


class SubmissionRefused(Struct, frozen=True):
    """A submission was refused for now (429, 503): its client is alive and will send it again."""

    subject: str
    """model_id or sampling_session_id."""

    @property
    def cause(self) -> str:
        return f"{self.subject} is refused"


class RequestCancelled(Struct, frozen=True):
    request_id: str

    @property
    def cause(self) -> str:
        return f"{self.request_id} is cancelled"


class ResultDurable(Struct, frozen=True):
    """The journal has a result that was decided before: clients may see it."""

    result: ResultRecord

    @property
    def cause(self) -> str:
        return self.result.request_id


class BodyLoaded(Struct, frozen=True):
    """The journal returned the body of a request that has to run (again); None when the body is lost."""

    request_id: str
    operation: Operation | None
    message: str = ""
    """Why it is lost."""

    @property
    def cause(self) -> str:
        return self.request_id


# ---- what clients keep by name


class SessionCreated(Struct, frozen=True):
    """A session is durable."""

    session: SessionRecord

    @property
    def cause(self) -> str:
        return self.session.session_id


class SessionChanged(Struct, frozen=True):
    """A known session gets new contents; otherwise it goes on as before."""

    session: SessionRecord

    @property
    def cause(self) -> str:
        return self.session.session_id


class SessionEnded(Struct, frozen=True):
    """Its client has finished, or was silent for too long: nobody will fetch its samples."""

    session_id: str
    status: str
    detail: str | None = None

    @property
    def cause(self) -> str:
        return self.session_id


class RecordingsUsed(Struct, frozen=True):
    """An accepted batch trains on recorded sequences: they are kept for another while."""

    sequence_ids: tuple[str, ...]

    @property
    def cause(self) -> str:
        return f"{len(self.sequence_ids)} recorded sequences are used"


class SamplerCreated(Struct, frozen=True):
    sampler: SamplerRecord

    @property
    def cause(self) -> str:
        return self.sampler.sampler_id


class SamplerJoined(Struct, frozen=True):
    """One more client uses a sampling session."""

    sampler_id: str

    @property
    def cause(self) -> str:
        return self.sampler_id


class CheckpointChanged(Struct, frozen=True):
    """A known checkpoint's record gets new contents; its files stay."""

    checkpoint: CheckpointRecord

    @property
    def cause(self) -> str:
        return self.checkpoint.path


class CheckpointDeleted(Struct, frozen=True):
    path: str

    @property
    def cause(self) -> str:
        return self.path


class CheckpointCopied(Struct, frozen=True):
    """A checkpoint gets a second name, in a run of its own that cannot be trained."""

    model: ModelRecord
    checkpoint: CheckpointRecord

    @property
    def cause(self) -> str:
        return self.checkpoint.path


class EventNoted(Struct, frozen=True):
    """The operator did something that changes no record, but belongs in the audit log."""

    event: str
    subject: str
    details: dict[str, Any]

    @property
    def cause(self) -> str:
        return f"{self.event} {self.subject}"


# ---- storage and time


class FilesListed(Struct, frozen=True):
    """The keys in storage below a prefix that belongs to a training run; None when storage did not answer."""

    model_id: str
    keys: tuple[str, ...] | None

    @property
    def cause(self) -> str:
        return self.model_id


class Tick(Struct, frozen=True):
    """Time has passed."""

    @property
    def cause(self) -> str:
        return "tick"


RecordFact = (
    SubmissionRefused
    | ResultDurable
    | SessionCreated
    | SessionChanged
    | SamplerCreated
    | SamplerJoined
    | CheckpointChanged
    | CheckpointDeleted
    | CheckpointCopied
    | EventNoted
    | RecordingsUsed
)
"""Facts that only change records: after one, nothing can run that could not run before."""

WorkFact = (
    RequestAccepted
    | LiveRequested
    | RequestCancelled
    | BodyLoaded
    | SessionEnded
    | WorkerProgress
    | WorkerReady
    | WorkerLost
    | CommandEnded
    | FilesListed
    | Tick
)
"""Facts after which something may run that could not run before."""

Fact = RecordFact | WorkFact
