"""Server ⇄ disk. The journal holds the newest version of each record under (type, key); live state is a fold over them.

Fields are only ever added, with a default, so that a newer server reads an older journal.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from tx_async.wire.worker import AdapterConfig


class SessionRecord(Struct, tag="session", frozen=True, kw_only=True):
    session_id: str
    owner: str
    created_at: float
    tags: tuple[str, ...] = ()
    user_metadata: dict[str, Any] = {}
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None
    status: Literal["active", "success", "errored", "interrupted", "expired"] = "active"
    detail: str | None = None

    @property
    def key(self) -> str:
        return self.session_id


class Snapshot(Struct, frozen=True, array_like=True):
    """The whole state of a training run after all of its operations up to `seq_id`."""

    key: str
    seq_id: int


class ModelRecord(Struct, tag="model", frozen=True, kw_only=True):
    """A training run. Its state is its newest snapshot (or its creation) plus the journaled operations after that."""

    model_id: str
    session_id: str
    owner: str
    base_model: str
    lora: AdapterConfig
    created_at: float
    base_fingerprint: str = ""
    """The fingerprint of the weights that `base_model` names; "" in older records, which means the journal's first
    base."""
    user_metadata: dict[str, Any] = {}
    created_from: str | None = None
    """The storage key, for a model created from a checkpoint."""
    created_from_path: str | None = None
    """The tinker:// path that its creator named."""
    created_with_optimizer: bool = False
    last_request_at: float = 0.0
    snapshots: tuple[Snapshot, ...] = ()
    """Newest first. Bodies of operations are kept from the oldest one on, so that a damaged snapshot only costs a
    longer replay."""
    dropped_seq_id: int = 0
    """Operations up to this seq_id can no longer be replayed; 0: the run can be repeated from its creation."""
    status: Literal["live", "unloaded", "corrupted", "copy"] = "live"
    newest_seq_id: int = 0
    """The largest seq_id among the forgotten requests, so that the client's next one does not count as too far
    ahead."""

    @property
    def key(self) -> str:
        return self.model_id


class SamplerRecord(Struct, tag="sampler", frozen=True, kw_only=True):
    """A sampling session, pinned to the weights that it was created with."""

    sampler_id: str
    session_id: str
    owner: str
    base_model: str
    created_at: float
    model_path: str | None = None
    storage_key: str | None = None
    """The storage key of the adapter's files; None samples the base model."""
    inflight_model_id: str | None = None
    """Set for a session that follows the inflight saves of a training run: its `storage_key` moves on with them."""
    num_clones: int = 0
    base_fingerprint: str = ""

    @property
    def key(self) -> str:
        return self.sampler_id


class RequestRecord(Struct, tag="request", frozen=True, kw_only=True):
    """An accepted request. Its body is stored beside it (`Journal.read_body`) as long as anything can need it."""

    request_id: str
    owner: str
    kind: str
    """The name of the operation struct."""
    subject: str
    """model_id or sampling_session_id."""
    seq_id: int
    body_digest: str
    body_bytes: int
    created_at: float
    sample_sequence_ids: tuple[str, ...] = ()
    storage_key: str = ""
    """The files that a LoadWeights found under its path: a replay loads the same, whatever the path means by then."""
    skipped: bool = False
    """It failed without any effect on the run: a replay leaves it out."""

    @property
    def key(self) -> str:
        return self.request_id


ResultContent = Literal["json", "sample", "forward_backward", "error"]
"""The content type of a result's payload."""


class ResultRecord(Struct, tag="result", frozen=True, kw_only=True):
    """How a request ended. `payload` is the wire form of its content type; clients may fetch it again until it
    expires."""

    request_id: str
    finished_at: float
    content: ResultContent
    payload: bytes

    @property
    def key(self) -> str:
        return self.request_id


class CheckpointRecord(Struct, tag="checkpoint", frozen=True, kw_only=True):
    """A complete checkpoint. Written after its files are durable, so a listed path is never incomplete."""

    path: str
    """tinker://<model_id>/<kind>/<name>"""
    model_id: str
    owner: str
    kind: Literal["weights", "sampler_weights", "external_weights"]
    name: str
    storage_key: str
    base_model: str
    lora: AdapterConfig
    created_at: float
    size_bytes: int
    public: bool = False
    user_metadata: dict[str, Any] = {}
    expires_at: float | None = None
    base_fingerprint: str = ""

    @property
    def key(self) -> str:
        return self.path


class KnownBase(Struct, frozen=True, kw_only=True):
    """A base model that this journal was served with."""

    fingerprint: str
    name: str
    path: str
    since: float
    """Seconds since the epoch."""


class KnownStorage(Struct, frozen=True, kw_only=True):
    """The storage in which this journal's checkpoints lie."""

    storage_id: str
    address: str
    """Its address when it last answered."""


class IdentityRecord(Struct, tag="identity", frozen=True, kw_only=True):
    """The identity of the server that this journal's data belong to; there is one such record."""

    journal_id: str
    bases: tuple[KnownBase, ...] = ()
    """The first is the base of records without a fingerprint; the last is the one served."""
    storage: KnownStorage | None = None

    @property
    def key(self) -> str:
        return "identity"


class AuditRecord(Struct, tag="audit", frozen=True, kw_only=True):
    """An event of the audit log: never changed, and forgotten when there are too many."""

    event_id: str
    """The event's number, which counts up and identifies it."""
    at: float
    event: str
    """`run.created`, `checkpoint.saved`, `key.added` …"""
    subject: str
    """The event's subject: a run's id, a checkpoint's tinker:// path, a key's name."""
    owner: str = ""
    """The owner who did it, and to whom its subject belongs; "" = the server's operator."""
    details: dict[str, Any] = {}

    @property
    def key(self) -> str:
        return self.event_id


class RecordedSequence(Struct, tag="recording", frozen=True, kw_only=True):
    """A sampled sequence that its session may train on with stable_reinforce; its body has the tokens and heads."""

    sequence_id: str
    session_id: str
    owner: str
    base_model: str
    num_bytes: int
    used_at: float

    @property
    def key(self) -> str:
        return self.sequence_id


class HistoryRecord(Struct, tag="history", frozen=True, kw_only=True):
    """Some optimizer steps of a training run, as rows of a table; number 0 holds the one row that is being gathered for
    the next step."""

    model_id: str
    number: int
    """Blocks count from 1, oldest first; all but the newest are full or thinned."""
    columns: tuple[str, ...] = ()
    values: bytes = b""
    """float64 little-endian, row by row; NaN where a step has no such number."""

    @property
    def key(self) -> str:
        return f"{self.model_id} {self.number:06d}"


Record = (
    SessionRecord
    | ModelRecord
    | SamplerRecord
    | RequestRecord
    | ResultRecord
    | CheckpointRecord
    | IdentityRecord
    | AuditRecord
    | RecordedSequence
    | HistoryRecord
)


class Put(Struct, tag=True, frozen=True):
    """Insert or replace a record; `body` goes only with a `RequestRecord` or a `RecordedSequence`; without one, the
    record keeps its body."""

    record: Record
    body: bytes | None = None


class Delete(Struct, tag=True, frozen=True):
    """Remove a record (and its body) if it is there."""

    table: Literal["session", "model", "sampler", "request", "result", "checkpoint", "audit", "recording", "history"]
    key: str


class DropBody(Struct, tag=True, frozen=True):
    """The body of a request is covered by a snapshot, or its request ended: free it, keep the record."""

    request_id: str


Change = Put | Delete | DropBody

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)
RECORD_TYPES = (
    "session",
    "model",
    "sampler",
    "request",
    "result",
    "checkpoint",
    "identity",
    "audit",
    "recording",
    "history",
)


def encode_record(record: Record) -> bytes:
    return _encoder.encode(record)


def decode_record(data: bytes) -> Record:
    return _decoder.decode(data)


def type_of(record: Record) -> str:
    return record.__struct_config__.tag  # type: ignore[return-value]
