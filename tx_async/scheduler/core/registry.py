"""The things that clients keep by name, beside their training runs: sessions, sampling sessions and checkpoints."""

from __future__ import annotations

import msgspec

from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.core.facts import (
    CheckpointChanged,
    CheckpointCopied,
    CheckpointDeleted,
    EventNoted,
    RecordingsUsed,
    SamplerCreated,
    SamplerJoined,
    SessionChanged,
    SessionCreated,
    SessionEnded,
)
from tx_async.wire.records import Delete, Put

RegistryFact = (
    SessionCreated
    | SessionChanged
    | SamplerCreated
    | SamplerJoined
    | CheckpointChanged
    | CheckpointDeleted
    | CheckpointCopied
    | EventNoted
    | RecordingsUsed
)


class Registry:
    def __init__(self, decisions: Decisions):
        self.decisions = decisions
        self.catalog = decisions.catalog

    def handle(self, fact: RegistryFact) -> None:
        match fact:
            case SessionCreated(session=session):
                self.decisions.know(Put(session))
            case SessionChanged(session=session):
                self.decisions.append(Put(session))
            case SamplerCreated(sampler=sampler):
                self.decisions.append(Put(sampler))
            case SamplerJoined(sampler_id=sampler_id):
                sampler = self.catalog.samplers[sampler_id]
                self.decisions.append(Put(msgspec.structs.replace(sampler, num_clones=sampler.num_clones + 1)))
            case CheckpointChanged(checkpoint=checkpoint):
                self.decisions.append(Put(checkpoint))
            case CheckpointDeleted(path=path):
                self._delete_checkpoint(path)
            case RecordingsUsed(sequence_ids=ids):
                used = filter(None, map(self.catalog.recordings.get, ids))
                self.decisions.append(*(Put(msgspec.structs.replace(r, used_at=self.decisions.now)) for r in used))
            case CheckpointCopied(model=model, checkpoint=checkpoint):
                self.decisions.append(Put(model), Put(checkpoint))
            case EventNoted():
                self.decisions.append(
                    *self.decisions.audit.noted(fact.event, fact.subject, fact.details, self.decisions.now)
                )

    def _delete_checkpoint(self, path: str) -> None:
        """Its files are deleted when nothing names them any more."""
        checkpoint = self.catalog.checkpoints.get(path)
        if checkpoint is not None:
            self.decisions.append(Delete("checkpoint", path))
            self.decisions.delete_files(checkpoint.storage_key)

    def end_session(self, fact: SessionEnded) -> None:
        session = self.catalog.sessions.get(fact.session_id)
        if session is not None:
            ended = msgspec.structs.replace(session, status=fact.status, detail=fact.detail)  # type: ignore[arg-type]
            self.decisions.append(Put(ended))
