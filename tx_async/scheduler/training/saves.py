"""All kinds of save_weights, and load_weights into a live run."""

from __future__ import annotations

import msgspec

from tx_async.errors import CheckpointExists, InvalidRequest
from tx_async.scheduler.core.decisions import Decisions
from tx_async.scheduler.training.lanes import Lane, Step
from tx_async.scheduler.training.runs import Runs
from tx_async.wire.ids import sampler_id
from tx_async.wire.operations import LoadWeights, SaveWeights
from tx_async.wire.records import Change, CheckpointRecord, Put, SamplerRecord
from tx_async.wire.worker import AdapterConfig, LoadAdapter, SaveAdapter

FILE_KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
RESULT_TYPES = {
    "weights": "save_weights",
    "sampler_weights": "save_weights_for_sampler",
    "external_weights": "save_weights_external",
}
EPHEMERAL = "ephemeral"


class Saves:
    def __init__(self, runs: Runs, decisions: Decisions):
        self.runs = runs
        self.decisions = decisions
        #: tinker:// path or sampling session -> seq_id of the save that is writing it
        self._saving: dict[str, int] = {}

    # ---- save

    def command(self, lane: Lane, step: Step, operation: SaveWeights, slot: int) -> SaveAdapter:
        """Raises `CheckpointExists`. Two saves of one name never share files: the record decides whose count."""
        name = name_of(lane, operation)
        if self._saving.get(name, step.seq_id) != step.seq_id or self._is_taken(name, lane, step, operation):
            if operation.name is None:
                raise CheckpointExists(f"The sampling session {name} exists already: use the next sequence number.")
            if not operation.overwrite:
                raise CheckpointExists(f"{name} exists already: choose another name, or save with overwrite=True.")
        self._saving[name] = step.seq_id
        return self._command(lane, step, operation, slot)

    def command_again(self, lane: Lane, step: Step) -> SaveAdapter:
        """The command that saves again when storage did not take the files: the worker still has the adapter in
        memory."""
        assert isinstance(step.operation, SaveWeights)
        return self._command(lane, step, step.operation, slot=0, again=True)

    def _command(self, lane: Lane, step: Step, operation: SaveWeights, slot: int, again: bool = False) -> SaveAdapter:
        return SaveAdapter(
            slot=slot,
            again=again,
            config=_saved_config(lane, operation),
            key=storage_key(lane, step, operation),
            kind=FILE_KINDS[operation.kind],  # type: ignore[arg-type]
            metadata={
                "base_fingerprint": lane.model.base_fingerprint or self.decisions.catalog.base_fingerprint,
                "base_model": lane.model.base_model,
                "model_id": lane.model_id,
                "name": operation.name or EPHEMERAL,
            },
            age_recipients=operation.age_recipients,
        )

    def finished(self, lane: Lane, step: Step, operation: SaveWeights, size_bytes: int) -> None:
        self.forget(lane, step, operation)
        if operation.name is None:
            self._finish_ephemeral(lane, step, operation)
            return
        now = self.decisions.now
        path = name_of(lane, operation)
        existing = self.decisions.catalog.checkpoints.get(path)
        record = CheckpointRecord(
            path=path,
            model_id=lane.model_id,
            owner=lane.model.owner,
            kind=operation.kind,
            name=operation.name,
            storage_key=storage_key(lane, step, operation),
            base_model=lane.model.base_model,
            base_fingerprint=lane.model.base_fingerprint,
            lora=_saved_config(lane, operation),
            created_at=now,
            size_bytes=size_bytes,
            user_metadata=operation.user_metadata,
            expires_at=None if operation.ttl_seconds is None else now + operation.ttl_seconds,
        )
        body: dict[str, object] = {"path": path, "type": RESULT_TYPES[operation.kind]}
        if operation.kind == "external_weights":
            body["size_bytes"] = size_bytes
        if existing and _is_later(existing.storage_key, record.storage_key):
            # Files of two saves may become durable in either order; the later save keeps the name.
            self.runs.succeed(step, body)
            self.decisions.delete_files(record.storage_key)
            return
        self.runs.succeed(step, body, Put(record))
        if existing and existing.storage_key != record.storage_key:
            self.decisions.delete_files(existing.storage_key)

    def _finish_ephemeral(self, lane: Lane, step: Step, operation: SaveWeights) -> None:
        """Make a sampling session for weights that have no name; an inflight save also moves its earlier sessions
        on."""
        model = lane.model
        record = SamplerRecord(
            sampler_id=name_of(lane, operation),
            session_id=model.session_id,
            owner=model.owner,
            base_model=model.base_model,
            base_fingerprint=model.base_fingerprint,
            created_at=self.decisions.now,
            storage_key=storage_key(lane, step, operation),
            inflight_model_id=model.model_id if operation.inflight else None,
        )
        earlier = self._inflight_samplers(model.model_id, record.sampler_id) if operation.inflight else []
        changes: list[Change] = [Put(record)]
        changes += [Put(msgspec.structs.replace(sampler, storage_key=record.storage_key)) for sampler in earlier]
        body = {"sampling_session_id": record.sampler_id, "type": RESULT_TYPES[operation.kind]}
        self.runs.succeed(step, body, *changes)
        for key in {sampler.storage_key for sampler in earlier if sampler.storage_key}:
            self.decisions.delete_files(key)

    def _inflight_samplers(self, model_id: str, except_id: str) -> list[SamplerRecord]:
        samplers = self.decisions.catalog.samplers.values()
        return [s for s in samplers if s.inflight_model_id == model_id and s.sampler_id != except_id]

    def forget(self, lane: Lane, step: Step, operation: SaveWeights) -> None:
        """The save is over, or will be requested again."""
        name = name_of(lane, operation)
        if self._saving.get(name) == step.seq_id:
            del self._saving[name]

    def _is_taken(self, name: str, lane: Lane, step: Step, operation: SaveWeights) -> bool:
        catalog = self.decisions.catalog
        if operation.name is not None:
            return name in catalog.checkpoints
        sampler = catalog.samplers.get(name)
        return sampler is not None and sampler.storage_key != storage_key(lane, step, operation)

    # ---- load

    def must_wait(self, step: Step, operation: LoadWeights) -> bool:
        """Whether an earlier save is still writing the files that the path will name."""
        saving = operation.path in self._saving and run_of(operation.path) in self.runs.lanes
        return saving and not step.request.storage_key

    def load_command(self, lane: Lane, step: Step, operation: LoadWeights, slot: int) -> LoadAdapter:
        """Raises `UnknownCheckpoint`, `InvalidRequest`. Which files are loaded is made durable before they are first
        read: the path may mean others when a replay reads them again."""
        if not step.request.storage_key:
            catalog = self.decisions.catalog
            checkpoint = catalog.find_checkpoint(step.request.owner, operation.path, operation.optimizer)
            _check_same_shape(lane, checkpoint)
            self.decisions.append(Put(msgspec.structs.replace(step.request, storage_key=checkpoint.storage_key)))
        key = step.request.storage_key
        return LoadAdapter(slot=slot, config=lane.model.lora, key=key, optimizer=operation.optimizer)


def _saved_config(lane: Lane, operation: SaveWeights) -> AdapterConfig:
    """The configuration of the written adapter: an export may leave out the unembedding, unless only that was
    trained."""
    lora = lane.model.lora
    if not operation.exclude_unembed:
        return lora
    if not (lora.train_attn or lora.train_mlp):
        raise InvalidRequest("exclude_unembed: this adapter adapts the unembedding only, so nothing would be exported.")
    return msgspec.structs.replace(lora, train_unembed=False)


def _check_same_shape(lane: Lane, checkpoint: CheckpointRecord) -> None:
    ours, theirs = lane.model.lora, checkpoint.lora
    differences = [
        f"{name} {getattr(theirs, name)} there, {getattr(ours, name)} here"
        for name in ("rank", "train_attn", "train_mlp", "train_unembed")
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if differences:
        raise InvalidRequest(
            f"{checkpoint.path} does not fit this model: {'; '.join(differences)}. Create a model from it instead."
        )


def storage_key(lane: Lane, step: Step, operation: SaveWeights) -> str:
    return f"{lane.model_id}/{operation.kind}/{operation.name or EPHEMERAL}~{step.seq_id}"


def _is_later(key: str, other: str) -> bool:
    (place, _, seq_id), (other_place, _, other_seq_id) = key.rpartition("~"), other.rpartition("~")
    return place == other_place and int(seq_id) > int(other_seq_id)


def name_of(lane: Lane, operation: SaveWeights) -> str:
    """The name by which clients will know the save."""
    if operation.name is not None:
        return checkpoint_path(lane.model_id, operation.kind, operation.name)
    assert operation.sampling_session_seq_id is not None
    return sampler_id(lane.model.session_id, operation.sampling_session_seq_id)


def run_of(path: str) -> str:
    return path.removeprefix("tinker://").partition("/")[0]


def checkpoint_path(model_id: str, kind: str, name: str) -> str:
    return f"tinker://{model_id}/{kind}/{name}"
