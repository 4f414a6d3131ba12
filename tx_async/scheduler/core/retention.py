"""Forgets old things, by named limits, so that memory, journal and storage stay flat however long the server runs."""

from __future__ import annotations

import msgspec

from tx_async.errors import Cancelled
from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.sampling.sampling import Sampling
from tx_async.scheduler.training.runs import Runs, snapshots_of
from tx_async.wire.records import Change, Delete, ModelRecord, Put, RequestRecord, SessionRecord


class Retention:
    def __init__(self, decisions: Decisions, runs: Runs, sampling: Sampling, policy: Policy):
        self.decisions = decisions
        self.catalog = decisions.catalog
        self.runs = runs
        self.sampling = sampling
        self.policy = policy
        self._last_sweep = decisions.now

    def sweep_if_due(self) -> None:
        if self.decisions.now - self._last_sweep >= self.policy.retention_interval_s:
            self._last_sweep = self.decisions.now
            self.sweep()

    def sweep(self) -> None:
        self._forget_results()
        self._expire_checkpoints()
        self._forget_recordings()
        self._forget_histories()
        for session in self._old_sessions():
            self._forget_session(session)

    def _forget_results(self) -> None:
        """Forget results that are too old, and the oldest when there are too many; but nothing that a replay may
        need."""
        needed = {
            step.request_id
            for lane in self.runs.lanes.values()
            for step in lane.steps.values()
            if not step.finished or step.needs_replay
        }
        excess = len(self.catalog.results) - self.policy.results_kept_max
        oldest_kept = self.decisions.now - self.policy.result_retention_s
        changes: list[Change] = []
        forgotten: list[RequestRecord] = []
        for i, (request_id, result) in enumerate(self.catalog.results.items()):
            if (i < excess or result.finished_at < oldest_kept) and request_id not in needed:
                changes += [Delete("result", request_id), Delete("request", request_id)]
                if request := self.catalog.requests.get(request_id):
                    forgotten.append(request)
        self.decisions.append(*changes, *self._forget_steps(forgotten))
        for request in forgotten:
            self.decisions.delete_files(request.storage_key)

    def _forget_steps(self, requests: list[RequestRecord]) -> list[Change]:
        """Runs forget them, too: a run that only evaluates takes no snapshot that would cover its operations."""
        newest: dict[str, int] = {}
        for request in requests:
            if lane := self.runs.lanes.get(request.subject):
                lane.forget(request.seq_id)
                newest[request.subject] = max(request.seq_id, newest.get(request.subject, lane.model.newest_seq_id))
        return [self.runs.changed(self.runs.lanes[name], newest_seq_id=number) for name, number in newest.items()]

    def _forget_recordings(self) -> None:
        old = self.catalog.recordings.unused_since(self.decisions.now - self.policy.stability_retention_s)
        self.decisions.append(*(Delete("recording", record.key) for record in old))

    def _forget_histories(self) -> None:
        """Forget the histories of the longest unused runs, until the rest fits."""
        histories, models = self.catalog.histories, self.catalog.models
        if histories.num_bytes <= self.policy.history_bytes_max:
            return
        for model_id in sorted(histories, key=lambda name: models[name].last_request_at if name in models else 0.0):
            if histories.num_bytes <= self.policy.history_bytes_max:
                break
            self.decisions.append(*histories.forget(model_id))

    def _expire_checkpoints(self) -> None:
        now = self.decisions.now
        expired = [c for c in self.catalog.checkpoints.values() if c.expires_at is not None and c.expires_at <= now]
        self.decisions.append(*(Delete("checkpoint", checkpoint.path) for checkpoint in expired))
        for checkpoint in expired:
            self.decisions.delete_files(checkpoint.storage_key)

    # ---- sessions

    def _old_sessions(self) -> list[SessionRecord]:
        """Sessions that have ended and were not used for `session_retention_s`."""
        used_at = {session.session_id: session.created_at for session in self.catalog.sessions.values()}
        for model in self.catalog.models.values():
            if model.session_id in used_at:
                used_at[model.session_id] = max(used_at[model.session_id], model.last_request_at)
        limit = self.decisions.now - self.policy.session_retention_s
        return [s for s in self.catalog.sessions.values() if s.status != "active" and used_at[s.session_id] < limit]

    def _forget_session(self, session: SessionRecord) -> None:
        """Forget a session with its runs and sampling sessions. Checkpoints have names of their own and stay."""
        self.sampling.cancel_session(session.session_id)
        for model in [m for m in self.catalog.models.values() if m.session_id == session.session_id]:
            self._forget_model(model)
        samplers = [s for s in self.catalog.samplers.values() if s.session_id == session.session_id]
        self.decisions.append(
            *(Delete("sampler", sampler.sampler_id) for sampler in samplers), Delete("session", session.session_id)
        )
        for key in {sampler.storage_key for sampler in samplers if sampler.storage_key}:
            self.decisions.delete_files(key)

    def _forget_model(self, model: ModelRecord) -> None:
        """A run that has checkpoints keeps its record, which describes them."""
        self.decisions.append(*self.catalog.histories.forget(model.model_id))
        has_checkpoints = any(c.model_id == model.model_id for c in self.catalog.checkpoints.values())
        change: Change = Delete("model", model.model_id)
        if has_checkpoints:
            status = "copy" if model.status == "copy" else "unloaded"
            change = Put(msgspec.structs.replace(model, status=status))
        if lane := self.runs.lanes.get(model.model_id):
            self.runs.abandon(lane, Cancelled("The session of this request has ended."), change)
        else:
            self.decisions.append(change)
            self.decisions.delete_files(snapshots_of(model.model_id))
