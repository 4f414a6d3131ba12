"""Keeps the records of sampled sequences, each tenant's within its limit of bytes."""

from __future__ import annotations

import logging

from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.sampling.jobs import SampleJob
from tx_async.wire.records import Delete, Put, RecordedSequence

_log = logging.getLogger(__name__)


class Recorder:
    def __init__(self, decisions: Decisions, policy: Policy):
        self.decisions = decisions
        self.catalog = decisions.catalog
        self.policy = policy

    def recorded(self, job: SampleJob) -> list[Put]:
        """The records on which the job's session may train with stable_reinforce; they become durable with the
        samples."""
        sampler = self.catalog.samplers.get(job.request.subject)
        if sampler is None:
            return []
        return [
            Put(
                RecordedSequence(
                    sequence_id=job.request.sample_sequence_ids[index],
                    session_id=sampler.session_id,
                    owner=job.request.owner,
                    base_model=sampler.base_model,
                    num_bytes=len(body),
                    used_at=self.decisions.now,
                ),
                body,
            )
            for index, body in job.recordings.items()
        ]

    def make_room(self, owner: str) -> None:
        gone = self.catalog.recordings.beyond(owner, self.policy.stability_bytes_max)
        if gone:
            self.decisions.append(*(Delete("recording", record.key) for record in gone))
            _log.warning(
                "%d recorded sequences of one key make room for newer ones (`stability_bytes_max`, %d bytes).",
                len(gone),
                self.policy.stability_bytes_max,
            )
