"""The scheduler actor: tells `SchedulerState` what happened, and answers the API.

The order of writes to disk, and what a crash leaves:
- A request is accepted after its record and body are durable; only then does the state get it, and the client learn
  its id (`acceptance.py`). After a crash before that, the client retries; after a later one, recovery finds the request
  and runs it.
- A result is published after it is durable (`performer.py`). After a crash before that, the request runs again, with
  the same outcome.
- A file is deleted after the record that named it is gone. A crash between the two leaves an orphan, never a dangling
  name.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, suppress
from typing import Any

import anyio
import msgspec

from tx_async import logs
from tx_async.actor import running
from tx_async.clock import Clock, SystemClock
from tx_async.config import ServerConfig
from tx_async.errors import NotFound, NotReady, ResultGone
from tx_async.journal.journal import Journal
from tx_async.metrics import Metrics
from tx_async.scheduler import newsreel
from tx_async.scheduler.acceptance import Acceptance
from tx_async.scheduler.assets import Assets
from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.core.facts import EventNoted, RequestCancelled, Tick
from tx_async.scheduler.core.history import HistoryRow
from tx_async.scheduler.core.marks import ReplayMarks
from tx_async.scheduler.core.overview import overview, requests_of, run_view
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.core.recovery import RecoveryProgress
from tx_async.scheduler.core.state import SchedulerState
from tx_async.scheduler.interface import BaseModelInfo, LivePiece, Passage, StillPending
from tx_async.scheduler.live import LiveRequests
from tx_async.scheduler.performer import DeleteBelow, DismissWorker, ListBelow, Performer, SendCommand, WidenWorker
from tx_async.scheduler.polls.payload_cache import PayloadCache
from tx_async.scheduler.polls.waiters import Waiters
from tx_async.scheduler.quota import Quota
from tx_async.scheduler.sessions import Sessions
from tx_async.scheduler.statistics import SchedulerStatistics, statistics_of
from tx_async.scheduler.submissions import Submissions, session_of
from tx_async.tracing import Tracing
from tx_async.wire import ids
from tx_async.wire.dashboard import Overview, RequestView, RunView
from tx_async.wire.facts import CommandEnded, WorkerFact
from tx_async.wire.operations import SUPPORT_TOKENS_MAX, Encoded, Operation, Sample
from tx_async.wire.records import (
    AuditRecord,
    CheckpointRecord,
    ModelRecord,
    Record,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    SessionRecord,
)

TICK_S = 1.0
DRAIN_INTERVAL_S = 0.02
STOPPING = "The server is shutting down. Try again when it is back."

_log = logging.getLogger(__name__)


class Scheduler:
    """Implements `interface.SchedulerApi`."""

    name = "scheduler"

    def __init__(
        self,
        config: ServerConfig,
        base_model: BaseModelInfo,
        journal: Journal,
        records: Iterable[Record],
        *,
        send: SendCommand,
        delete_files: DeleteBelow,
        list_files: ListBelow,
        dismiss: DismissWorker = lambda worker_id, reason: None,
        widen: WidenWorker = lambda worker_id, lora_rank: None,
        worker_status: Callable[[bool], list[str]],
        storage_status: Callable[[], list[str]] = list,
        worker_silence: Callable[[], dict[str, str]] = dict,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
        marks: ReplayMarks | None = None,
    ):
        marks = marks or ReplayMarks()
        self.config = config
        self.base_model = base_model
        self.journal = journal
        self.clock = clock or SystemClock()
        self._worker_status = worker_status
        self._storage_status = storage_status
        #: workers that have missed heartbeats, and are not given up yet -> which of their processes
        self.silence = worker_silence
        self.catalog = Catalog(records)
        self.state = SchedulerState(self.catalog, base_model, policy_of(config), self.clock.now(), marks)
        self.waiters = Waiters()
        self.payloads = PayloadCache(config.result_cache_bytes)
        self.quota = Quota(config)
        self.performer = Performer(
            self.state,
            journal,
            self.clock,
            self._publish,
            send=send,
            delete_files=delete_files,
            list_files=list_files,
            dismiss=dismiss,
            widen=widen,
            metrics=metrics,
            tracing=tracing,
            marks=marks,
            deliver=lambda instruction: self._live.deliver(instruction),
        )
        self._live = LiveRequests(self.performer, self.quota, self.clock, self.waiting_for)
        self._submissions = Submissions(self.state, self.quota)
        self._acceptance = Acceptance(self._submissions, journal, self.performer, self.clock)
        self._assets = Assets(self.catalog, base_model.name, self.performer, self.clock)
        self._sessions = Sessions(self.catalog, journal, self.performer, self.clock, self._timeout_of)
        self._recovery = RecoveryProgress()
        self._is_stopping = False

    def __repr__(self) -> str:
        return repr(self.state)

    # ---- its own life

    async def run(self) -> None:
        """Recover, then serve until cancelled. A broken invariant ends it, and with it the process."""
        self._recover()
        async with running(self.performer):
            await self._tick_for_ever()

    def _recover(self) -> None:
        for request in self.catalog.requests.values():
            if request.request_id not in self.catalog.results:
                self.quota.take(request)
                self.performer.watch.recovered(request)
        self.performer.perform(self.state.restore())

    def begin_stop(self) -> None:
        """Refuse new work, and end live requests while their clients can still be told. May be called again."""
        if not self._is_stopping:
            self._is_stopping = True
            self._live.end_all(NotReady(STOPPING))

    async def stop(self, timeout_s: float) -> None:
        """Refuse new work and snapshot what would otherwise have to be replayed, for at most `timeout_s`."""
        self.begin_stop()
        with anyio.move_on_after(timeout_s):
            while True:
                instructions, is_busy = self.state.drain(self.clock.now())
                self.performer.perform(instructions)
                if not is_busy and not len(self.performer.outbox):
                    break
                await anyio.sleep(DRAIN_INTERVAL_S)

    async def _tick_for_ever(self) -> None:
        load = newsreel.LoadReport(self.clock.monotonic(), self.statistics())
        while True:
            await anyio.sleep(TICK_S)
            self.performer.handle(Tick())
            self._live.tick()
            self._sessions.expire()
            self._recovery.report(self.state.training.runs.num_replays, self.clock.monotonic())
            load.report(self.clock.monotonic(), self.statistics())

    def tell(self, fact: WorkerFact) -> None:
        """Take a fact from the router."""
        self.performer.handle(fact)
        if isinstance(fact, CommandEnded):
            fact.release()

    # ---- views

    @property
    def sessions(self) -> dict[str, SessionRecord]:
        return self.catalog.sessions

    @property
    def models(self) -> dict[str, ModelRecord]:
        return self.catalog.models

    @property
    def samplers(self) -> dict[str, SamplerRecord]:
        return self.catalog.samplers

    @property
    def checkpoints(self) -> dict[str, CheckpointRecord]:
        return self.catalog.checkpoints

    @property
    def audits(self) -> dict[str, AuditRecord]:
        return self.catalog.audits

    def history(self, model_id: str, since: int = 0) -> list[HistoryRow]:
        return self.catalog.histories.rows(model_id, since)

    def overview(self) -> Overview:
        view = overview(self.state, self.quota.requests.parts, self.quota.num_samples)
        return msgspec.structs.replace(view, operations_lost=self._recovery.total(view.operations_to_replay))

    def run_view(self, model: ModelRecord) -> RunView:
        return run_view(self.state, model)

    def requests_of(self, model_id: str, limit: int) -> list[RequestView]:
        return requests_of(self.state, model_id, limit, self.performer.watch.passages.get)

    def passages(self, session_id: str) -> list[Passage]:
        return self.performer.watch.passages.of_session(session_id)

    def note(self, event: str, subject: str, **details: Any) -> None:
        self.performer.handle(EventNoted(event, subject, details))

    def waiting_for(self, in_full: bool = False) -> list[str]:
        able = [worker for worker in self.state.workers.values() if not worker.is_on_trial]
        capabilities = {capability for worker in able for capability in worker.capabilities}
        waiting = self._storage_status()
        if capabilities >= {"train", "sample"}:
            return waiting
        return [*waiting, *(self._worker_status(in_full) or ["a worker: none is attached"])]

    def statistics(self) -> SchedulerStatistics:
        return statistics_of(self.state, len(self.quota), len(self.waiters))

    # ---- sessions

    async def create_session(self, session: SessionRecord) -> SessionRecord:
        self._refuse_when_stopping()
        self.quota.check_record(self.catalog.holdings, session)
        return await self._sessions.create(session)

    def heartbeat(self, owner: str, session_id: str) -> None:
        self._sessions.heartbeat(owner, session_id)

    async def finish_session(self, owner: str, session_id: str, status: str, detail: str | None) -> None:
        await self._sessions.finish(owner, session_id, status, detail)

    async def update_session(self, owner: str, session: SessionRecord) -> None:
        await self._sessions.update(owner, session)

    # ---- samplers and checkpoints

    async def create_sampler(
        self, owner: str, session_id: str, sampling_session_seq_id: int, base_model: str | None, model_path: str | None
    ) -> SamplerRecord:
        self._refuse_when_stopping()
        session = self._sessions.find(owner, session_id)
        self._sessions.seen(session)
        if ids.sampler_id(session_id, sampling_session_seq_id) not in self.catalog.samplers:
            self.quota.check_number(self.catalog.holdings, owner, "sampler")
        return await self._assets.create_sampler(session, sampling_session_seq_id, base_model, model_path)

    async def join_sampler(self, owner: str, sampler_id: str) -> int:
        return await self._assets.join_sampler(owner, sampler_id)

    async def update_checkpoint(self, owner: str, checkpoint: CheckpointRecord) -> None:
        await self._assets.update_checkpoint(owner, checkpoint)

    async def delete_checkpoint(self, owner: str, path: str) -> None:
        await self._assets.delete_checkpoint(owner, path)

    async def copy_checkpoint(self, owner: str, path: str, session_id: str, model_seq_id: int) -> CheckpointRecord:
        return await self._assets.copy_checkpoint(owner, path, session_id, model_seq_id)

    async def add_checkpoint(self, model: ModelRecord, checkpoint: CheckpointRecord) -> None:
        await self._assets.add_checkpoint(model, checkpoint)

    # ---- requests

    async def submit(self, owner: str, operation: Operation, encoded: Encoded | None = None) -> RequestRecord:
        if session := session_of(self.catalog, owner, operation):
            self._sessions.seen(session)
        if self._submissions.is_new(operation):
            self._refuse_when_stopping()
        return await self._acceptance.submit(owner, operation, encoded)

    async def retrieve(self, owner: str, request_id: str, timeout_s: float) -> ResultRecord | StillPending:
        request = self.catalog.requests.get(request_id)
        if request is None or request.owner != owner:
            raise ResultGone()
        self._heard_of_client(request)
        self.performer.watch.polled(request_id)
        if request_id not in self.catalog.results and not await self.waiters.wait(request_id, timeout_s):
            return self._still_pending(request_id)
        self.performer.watch.fetched(request_id)
        if result := self.payloads.get(request_id):
            return result
        with suppress(NotFound):
            return await self.journal.read_result(request_id)
        raise ResultGone()

    def _heard_of_client(self, request: RequestRecord) -> None:
        """A client that polls is alive, whether or not it sends heartbeats."""
        subject = self.catalog.samplers.get(request.subject) or self.catalog.models.get(request.subject)
        session = self.catalog.sessions.get(subject.session_id) if subject else None
        if session is not None and session.status == "active":
            self._sessions.seen(session)

    def _timeout_of(self) -> Callable[[str], float]:
        """The silence after which a session ends: a few missing heartbeats while it samples, as a killed client fetches
        nothing."""
        sampling = {job.flow[1] for job in self.state.sampling.jobs.values()}
        longest = self.config.session_timeout_s
        shortest = min(self.config.heartbeat_timeout_s, longest)
        return lambda session_id: shortest if session_id in sampling else longest

    def _publish(self, result: ResultRecord) -> None:
        """The result is durable: whoever waits for it may see it."""
        self.quota.give_back(result.request_id)
        self.payloads.put(result)
        self.waiters.wake(result.request_id)
        request = self.catalog.requests.get(result.request_id)
        passage = self.performer.watch.passages.get(result.request_id)
        with logs.about(passage.http_id if passage else ""):
            newsreel.result_known(request, self.catalog.models.get(request.subject) if request else None, result)

    def _still_pending(self, request_id: str) -> StillPending:
        if missing := self.waiting_for():
            return StillPending("paused_capacity", f"The server is not ready: {'; '.join(missing)}")
        if (silence := self.silence()) and silence.keys() >= self.state.workers.keys():
            return StillPending("paused_capacity", f"No worker answers: {'; '.join(silence.values())}")
        if nowhere := self.state.stranded.get(request_id):
            return StillPending("paused_capacity", f"Waiting for a worker that can sample this ({nowhere})")
        return StillPending()

    async def cancel(self, owner: str, request_id: str) -> None:
        request = self.catalog.requests.get(request_id)
        if request is not None and request.owner == owner:
            self.performer.handle(RequestCancelled(request_id))

    async def sample_live(
        self, owner: str, operation: Sample, model_path: str | None = None
    ) -> AsyncGenerator[LivePiece, None]:
        self._refuse_when_stopping()
        async with aclosing(self._live.sample(owner, operation, model_path)) as pieces:
            async for piece in pieces:
                yield piece

    def _refuse_when_stopping(self) -> None:
        if self._is_stopping:
            raise NotReady(STOPPING)


def policy_of(config: ServerConfig) -> Policy:
    return Policy(
        quanta_in_flight_max=config.commands_in_flight_max,
        train_share=config.train_share,
        sample_share=config.sample_share,
        live_share=config.live_share,
        seq_gap_s=config.seq_gap_ms / 1000,
        chunk_gap_s=config.chunk_gap_ms / 1000,
        seq_ahead_max=config.seq_ahead_max,
        storage_patience_s=config.storage_patience_s,
        snapshot_every_steps=config.snapshot_every_steps,
        snapshot_every_bytes=config.snapshot_every_bytes,
        snapshot_idle_s=config.snapshot_idle_s,
        result_retention_s=config.result_retention_s,
        results_kept_max=config.results_kept_max,
        stability_head_tokens=config.stability_head_tokens,
        stability_support_max=min(config.stability_support_max, SUPPORT_TOKENS_MAX),
        stability_retention_s=config.stability_retention_s,
        stability_bytes_max=config.stability_bytes_max,
        session_retention_s=config.session_retention_s,
        retention_interval_s=config.retention_interval_s,
        audit_events_max=config.audit_events_max,
        history_steps_max=config.history_steps_max,
        history_bytes_max=config.history_bytes_max,
    )
