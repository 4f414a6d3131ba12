"""The things that clients know by name, beside their training runs: sampling sessions and checkpoints.

Each call checks what it may do against the records, tells the state, and returns when that is durable.
"""

from __future__ import annotations

from msgspec.structs import replace

from tx_async.clock import Clock
from tx_async.errors import Conflict, InvalidRequest, UnknownCheckpoint, UnknownSampler
from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.core.facts import (
    CheckpointChanged,
    CheckpointCopied,
    CheckpointDeleted,
    SamplerCreated,
    SamplerJoined,
)
from tx_async.scheduler.performer import Performer
from tx_async.wire import ids
from tx_async.wire.records import CheckpointRecord, ModelRecord, SamplerRecord, SessionRecord


class Assets:
    def __init__(self, catalog: Catalog, base_model_name: str, performer: Performer, clock: Clock):
        self.catalog = catalog
        self.base_model_name = base_model_name
        self.performer = performer
        self.clock = clock

    # ---- samplers

    async def create_sampler(
        self, session: SessionRecord, sampling_session_seq_id: int, base_model: str | None, model_path: str | None
    ) -> SamplerRecord:
        """Raises `InvalidRequest`, `UnknownCheckpoint`, and `Conflict` when the number was used for other weights."""
        if base_model is not None and base_model != self.base_model_name:
            raise InvalidRequest(
                f"base_model {base_model!r} is not served here; this server has {self.base_model_name!r}."
            )
        sampler_id = ids.sampler_id(session.session_id, sampling_session_seq_id)
        if existing := self.catalog.samplers.get(sampler_id):
            if existing.model_path != model_path:
                raise Conflict(f"{sampler_id} was created before, for other weights. Use the next sequence number.")
            return existing
        sampler = new_sampler(self.catalog, session, sampler_id, self.base_model_name, model_path, self.clock.now())
        await self.performer.handle_durably(SamplerCreated(sampler))
        return sampler

    async def join_sampler(self, owner: str, sampler_id: str) -> int:
        sampler = self.catalog.samplers.get(sampler_id)
        if sampler is None or sampler.owner != owner:
            raise UnknownSampler()
        number = sampler.num_clones + 1
        await self.performer.handle_durably(SamplerJoined(sampler_id))
        return number

    # ---- checkpoints

    def _checkpoint(self, owner: str, path: str) -> CheckpointRecord:
        checkpoint = self.catalog.checkpoints.get(path)
        if checkpoint is None or checkpoint.owner != owner:
            raise UnknownCheckpoint()
        return checkpoint

    async def update_checkpoint(self, owner: str, checkpoint: CheckpointRecord) -> None:
        changed = replace(
            self._checkpoint(owner, checkpoint.path),
            public=checkpoint.public,
            expires_at=checkpoint.expires_at,
            user_metadata=checkpoint.user_metadata,
        )
        await self.performer.handle_durably(CheckpointChanged(changed))

    async def delete_checkpoint(self, owner: str, path: str) -> None:
        self._checkpoint(owner, path)
        await self.performer.handle_durably(CheckpointDeleted(path))

    async def copy_checkpoint(self, owner: str, path: str, session_id: str, model_seq_id: int) -> CheckpointRecord:
        """The copy names the same immutable files; they are deleted when nothing names them any more."""
        source = self.catalog.find_checkpoint(owner, path)
        model_id = ids.model_id(session_id, model_seq_id)
        copied_path = f"tinker://{model_id}/{source.kind}/{source.name}"
        if (run := self.catalog.models.get(model_id)) and run.status != "copy":
            raise Conflict(f"{model_id} is a training run: a copy would take its place. Use the next sequence number.")
        if existing := self.catalog.checkpoints.get(copied_path):
            if existing.storage_key != source.storage_key:
                raise Conflict(f"{copied_path} is a copy of another checkpoint. Use the next sequence number.")
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
        copied = replace(
            source, path=copied_path, model_id=model_id, owner=owner, created_at=now, public=False, expires_at=None
        )
        await self.add_checkpoint(model, copied)
        return copied

    async def add_checkpoint(self, model: ModelRecord, checkpoint: CheckpointRecord) -> None:
        await self.performer.handle_durably(CheckpointCopied(model, checkpoint))


def new_sampler(
    catalog: Catalog, session: SessionRecord, sampler_id: str, base_model: str, model_path: str | None, now: float
) -> SamplerRecord:
    """The new sampler is pinned to the files that the path means now. Raises `UnknownCheckpoint`."""
    checkpoint = catalog.find_checkpoint(session.owner, model_path) if model_path else None
    return SamplerRecord(
        sampler_id=sampler_id,
        session_id=session.session_id,
        owner=session.owner,
        base_model=base_model,
        base_fingerprint=catalog.base_fingerprint,
        created_at=now,
        model_path=model_path,
        storage_key=checkpoint.storage_key if checkpoint else None,
    )
