"""What the API may ask of the scheduler. `scheduler.py` implements it; `testing/` ships a fake of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import Any, Literal, Protocol

from msgspec import Struct

from tx_async.wire.dashboard import Overview, RequestView, RunView
from tx_async.wire.operations import Encoded, Operation, Sample
from tx_async.wire.records import (
    AuditRecord,
    CheckpointRecord,
    ModelRecord,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    SessionRecord,
)
from tx_async.wire.results import TopkLogprobs

QueueState = Literal["active", "paused_capacity", "paused_rate_limit"]


class StillPending(Struct, frozen=True):
    """A long poll ended without a result: the client polls again."""

    queue_state: QueueState = "active"
    queue_state_reason: str | None = None


class Passage(Struct, kw_only=True):
    """When a request passed the stations on its way, in seconds since the epoch; 0 = not yet, or no longer known: of
    the time before the server's start, only the journal's two times are known."""

    request_id: str
    kind: str
    """Its name in the API: forward_backward, optim_step, sample …"""
    subject: str
    """model_id or sampling_session_id."""
    seq_id: int
    accepted_at: float
    """It arrived, whole and valid."""
    durable_at: float = 0.0
    """It is in the journal and waits for its turn."""
    begun_at: float = 0.0
    """Its first part was sent to a worker."""
    first_token_at: float = 0.0
    """A sample's first token was drawn."""
    ended_at: float = 0.0
    """All of it is back, or it has failed."""
    published_at: float = 0.0
    """Its result is durable: clients may see it."""
    fetched_at: float = 0.0
    """Its client has it."""
    worker_id: str = ""
    """The worker on which it began."""
    failed: bool = False
    http_id: str = ""
    """X-Request-Id of the HTTP request that brought it."""
    trace: Any = None
    """Its trace span (`tracing.py`); None where there are no traces."""

    def stations(self, until: float = 0.0) -> list[tuple[str, float, float]]:
        """(name, when it came, when it left) of each station that it has passed: the journal, its turn, a worker, the
        journal again. With `until`, also the station where it is at that time, its client included. Unknown stations
        are left out."""
        times = [(name, time) for name, mark in STATIONS.items() if (time := getattr(self, mark))]
        if until:
            times.append(("", until))
        return [(name, began, ended) for (name, began), (_, ended) in pairwise(times)]


STATIONS = {
    "accept": "accepted_at",
    "queue": "durable_at",
    "run": "begun_at",
    "commit": "ended_at",
    "fetch": "published_at",
}
"""The name of a station -> when a request gets there."""


class LivePiece(Struct, frozen=True, kw_only=True):
    """The tokens that one quantum brought for one sample of a live request."""

    index: int
    """The number of the sample."""
    tokens: bytes
    """int32 [T]; may be empty on a sample's last piece. The token that completes a stop string is included."""
    logprobs: bytes
    """float32 [T]: the model's own, before temperature, penalties and filters."""
    topk: TopkLogprobs | None = None
    """T entries, where `topk_sample_logprobs` asks for them."""
    stop_reason: Literal["stop", "length"] | None = None
    """Set on a sample's last piece."""
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache; on a sample's last piece."""
    prompt: dict[str, Any] = {}
    """The fields of `SampleResult` about the prompt, where they were asked for; on the last piece of sample 0."""


class BaseModelInfo(Struct, frozen=True, kw_only=True):
    """What the API must know about the base model to validate a request; read from its files, before any worker is
    ready."""

    name: str
    aliases: tuple[str, ...] = ()
    """Other names by which a request may call it."""
    path: str
    """The folder of the model's files on this host ("" when it is a hub name)."""
    architecture: str
    vocab_size: int
    max_context_length: int
    eos_token_ids: tuple[int, ...] = ()
    max_lora_rank: int = 32
    target_tokens_k_max: int = 128
    fingerprint: str = ""
    """The fingerprint of its weights and configuration; "" while no weights are on this host."""
    tokenizer_problem: str = ""
    """Why stop strings cannot be found here; "" when they can be."""

    @property
    def public_names(self) -> list[str]:
        """Its names, without folders of this host among the aliases."""
        aliases = (name for name in self.aliases if not PurePath(name).is_absolute())
        return list(dict.fromkeys((self.name, *aliases)))


class SchedulerApi(Protocol):
    """Every call checks ownership: what belongs to another owner does not exist (`NotFound`).

    Mappings are live, read-only views. Coroutines return after the journal has committed what they changed.
    """

    base_model: BaseModelInfo

    @property
    def sessions(self) -> Mapping[str, SessionRecord]: ...

    @property
    def models(self) -> Mapping[str, ModelRecord]: ...

    @property
    def samplers(self) -> Mapping[str, SamplerRecord]: ...

    @property
    def checkpoints(self) -> Mapping[str, CheckpointRecord]:
        """All checkpoints by tinker:// path; expired ones are gone."""
        ...

    @property
    def audits(self) -> Mapping[str, AuditRecord]:
        """All tenants' and the operator's events, oldest first."""
        ...

    def history(self, model_id: str, since: int = 0) -> Sequence[Mapping[str, float]]:
        """A row of numbers for each optimizer step of a run from this `index` on, oldest first, thinned with age; empty
        if there is no such run."""
        ...

    def overview(self) -> Overview: ...

    def run_view(self, model: ModelRecord) -> RunView: ...

    def requests_of(self, model_id: str, limit: int) -> Sequence[RequestView]:
        """The requests of a run, newest first."""
        ...

    def passages(self, session_id: str) -> list[Passage]:
        """The passages of a session's requests that are on record, oldest first."""
        ...

    def note(self, event: str, subject: str, **details: Any) -> None:
        """Add an event of the operator's to the audit log; it becomes durable soon."""
        ...

    def waiting_for(self, in_full: bool = False) -> list[str]:
        """What is still missing before a request can run; empty when the server is ready. in_full: with details for
        operators, such as a worker's last words."""
        ...

    async def create_session(self, session: SessionRecord) -> SessionRecord: ...

    def heartbeat(self, owner: str, session_id: str) -> None:
        """Raises `UnknownSession`, or `SessionGone` when it has ended."""
        ...

    async def finish_session(self, owner: str, session_id: str, status: str, detail: str | None) -> None:
        """End a session; the first reason wins."""
        ...

    async def create_sampler(
        self, owner: str, session_id: str, sampling_session_seq_id: int, base_model: str | None, model_path: str | None
    ) -> SamplerRecord:
        """Idempotent by (session, sequence number); `Conflict` for other content. `model_path` may name any
        checkpoint kind."""
        ...

    async def join_sampler(self, owner: str, sampler_id: str) -> int:
        """A number ≥ 1 that no other client of this sampling session has."""
        ...

    async def submit(self, owner: str, operation: Operation, encoded: Encoded | None = None) -> RequestRecord:
        """Accept an operation. The same key returns the first request; `Conflict` with another body. `Overloaded`:
        try later.

        An operation that is refused only because of live state (an unknown checkpoint, a rank that does not fit) is
        accepted all the same and fails through its result, so that its seq_id counts as used.
        """
        ...

    async def retrieve(self, owner: str, request_id: str, timeout_s: float) -> ResultRecord | StillPending:
        """Wait for a result. Raises `ResultGone` for an unknown or expired id."""
        ...

    async def cancel(self, owner: str, request_id: str) -> None:
        """Cancels samples only; training is never cancelled. Unknown ids are ignored."""
        ...

    def sample_live(
        self, owner: str, operation: Sample, model_path: str | None = None
    ) -> AsyncGenerator[LivePiece, None]:
        """Sample for a waiting client, piece by piece as quanta end; use it within `contextlib.aclosing`.

        `model_path` is a checkpoint of any kind, None the base model. Nothing about it is journaled: a crash ends it.
        Closing the generator ends what still runs within a quantum. Raises before the first piece: `UnknownCheckpoint`
        (an unknown or foreign one), `OtherBase`, `InvalidRequest`, `Overloaded`, `NotReady`; later a `TxError` whose
        message says to try again.
        """
        ...

    async def update_checkpoint(self, owner: str, checkpoint: CheckpointRecord) -> None:
        """Replace the mutable fields (public, expires_at, user_metadata) of a checkpoint."""
        ...

    async def delete_checkpoint(self, owner: str, path: str) -> None: ...

    async def copy_checkpoint(self, owner: str, path: str, session_id: str, model_seq_id: int) -> CheckpointRecord:
        """Copy into a new, untrainable run."""
        ...

    async def add_checkpoint(self, model: ModelRecord, checkpoint: CheckpointRecord) -> None:
        """Add a checkpoint whose files are durable, in a new, untrainable run of an existing session."""
        ...

    async def update_session(self, owner: str, session: SessionRecord) -> None:
        """Replace the mutable fields (project_id) of a session."""
        ...
