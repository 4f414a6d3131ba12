"""What clients know by a name of its own, beside their training runs: sampling sessions and checkpoints."""

from __future__ import annotations

import msgspec

from tx_async.clock import Clock
from tx_async.errors import Conflict, InvalidRequest, UnknownCheckpoint, UnknownSampler
from tx_async.scheduler.core.state import SchedulerState
from tx_async.scheduler.performer import Performer
from tx_async.wire import ids
from tx_async.wire.records import CheckpointRecord, Delete, ModelRecord, Put, SamplerRecord, SessionRecord


class Assets:
    """Their records; what is sampled from them, and their files, are the state's."""

    def __init__(self, state: SchedulerState, performer: Performer, clock: Clock):
        self.state = state
        self.catalog = state.catalog
        self.performer = performer
        self.clock = clock

    # ---- samplers

    async def create_sampler(
        self, session: SessionRecord, sampling_session_seq_id: int, base_model: str | None, model_path: str | None
    ) -> SamplerRecord:
        """Raises `InvalidRequest`, `UnknownCheckpoint`, and `Conflict` when the number was used for other weights."""
        if base_model is not None and base_model != self.state.base_model.name:
            raise InvalidRequest(
                f"base_model {base_model!r} is not served here; this server has {self.state.base_model.name!r}."
            )
        sampler_id = ids.sampler_id(session.session_id, sampling_session_seq_id)
        if existing := self.catalog.samplers.get(sampler_id):
            if existing.model_path != model_path:
                raise Conflict(f"{sampler_id} was created before, for other weights. Use the next sequence number.")
            return existing
        checkpoint = self.catalog.find_checkpoint(session.owner, model_path) if model_path else None
        sampler = SamplerRecord(
            sampler_id=sampler_id,
            session_id=session.session_id,
            owner=session.owner,
            base_model=self.state.base_model.name,
            base_fingerprint=self.catalog.base_fingerprint,
            created_at=self.clock.now(),
            model_path=model_path,
            storage_key=checkpoint.storage_key if checkpoint else None,
        )
        await self.performer.decide(Put(sampler))
        return sampler

    async def join_sampler(self, owner: str, sampler_id: str) -> int:
        sampler = self.catalog.samplers.get(sampler_id)
        if sampler is None or sampler.owner != owner:
            raise UnknownSampler()
        joined = msgspec.structs.replace(sampler, num_clones=sampler.num_clones + 1)
        await self.performer.decide(Put(joined))
        return joined.num_clones

    # ---- checkpoints

    def _checkpoint(self, owner: str, path: str) -> CheckpointRecord:
        checkpoint = self.catalog.checkpoints.get(path)
        if checkpoint is None or checkpoint.owner != owner:
            raise UnknownCheckpoint()
        return checkpoint

    async def update_checkpoint(self, owner: str, checkpoint: CheckpointRecord) -> None:
        changed = msgspec.structs.replace(
            self._checkpoint(owner, checkpoint.path),
            public=checkpoint.public,
            expires_at=checkpoint.expires_at,
            user_metadata=checkpoint.user_metadata,
        )
        await self.performer.decide(Put(changed))

    async def delete_checkpoint(self, owner: str, path: str) -> None:
        checkpoint = self._checkpoint(owner, path)
        durable = self.performer.decide(Delete("checkpoint", path))
        self.state.decisions.delete_files(checkpoint.storage_key)
        self.performer.perform(self.state.decisions.take())
        await durable

    async def copy_checkpoint(self, owner: str, path: str, session_id: str, model_seq_id: int) -> CheckpointRecord:
        """The copy names the same immutable files; they go when nothing names them any more."""
        source = self.catalog.find_checkpoint(owner, path)
        model_id = ids.model_id(session_id, model_seq_id)
        copied_path = f"tinker://{model_id}/{source.kind}/{source.name}"
        if existing := self.catalog.checkpoints.get(copied_path):
            return self._checkpoint(owner, existing.path)
        now = self.clock.now()
        model = ModelRecord(
            model_id=model_id,
            session_id=session_id,
            owner=owner,
            base_model=source.base_model,
            base_fingerprint=source.base_fingerprint,
            lora=source.lora,
            created_at=now,
            last_request_at=now,
            status="copy",
        )
        copied = msgspec.structs.replace(
            source, path=copied_path, model_id=model_id, owner=owner, created_at=now, public=False, expires_at=None
        )
        await self.performer.decide(Put(model), Put(copied))
        return copied
