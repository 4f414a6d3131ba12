"""A worker whose mathematics is a hash chain: what an adapter has become tells exactly which rows and steps went into
it, in which order. A lost, doubled or misplaced effect changes every number after it; `reference_*` compute the same
numbers from a list of operations.

The files of `Storage` outlive a worker, as checkpoints do. A saved adapter is in the worker's memory at once, and
durable when `finish_save` says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec import Struct

from tx_async.errors import CorruptedCheckpoint, EngineError, NonFiniteGradients, StorageError, UnknownCheckpoint
from tx_async.scheduler.training.packing import pack
from tx_async.wire.operations import ForwardBackward
from tx_async.wire.ranks import class_of
from tx_async.wire.worker import (
    TRAIN_TENSORS,
    AdapterConfig,
    AdmitSequences,
    CancelSequences,
    Command,
    CreateAdapter,
    Done,
    EngineInfo,
    FinishedSequence,
    LoadAdapter,
    Loaded,
    LoadSampler,
    ReleaseAdapter,
    Result,
    Sampled,
    SampleQuantum,
    SaveAdapter,
    Saved,
    SequencePiece,
    SequenceSpec,
    StepOptimizer,
    Stepped,
    Trained,
    TrainMicroBatch,
)

NAN_TOKEN = 99
"""A datum that begins with it brings NaN gradients."""
NAN_LOSS_TOKEN = 97
"""A datum that begins with it brings them, too, and its loss is NaN."""
MODULUS = 2**20
"""Numbers that float32 holds exactly."""


def chain(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little")


class Adapter(Struct, frozen=True):
    """Weights, Adam's moments, gradients (0 = none, -1 = NaN) and step count, each a link of a chain."""

    weights: int
    moments: int = 0
    gradients: int = 0
    step: int = 0

    @classmethod
    def created(cls, config: AdapterConfig) -> Adapter:
        return cls(chain("create", config.seed, config.rank))

    def with_row(self, tokens: bytes, has_nan: bool) -> Adapter:
        is_nan = has_nan or self.gradients == -1
        return msgspec.structs.replace(self, gradients=-1 if is_nan else chain(self.gradients, tokens))

    def stepped(self, learning_rate: float) -> Adapter:
        moments = chain(self.moments, self.gradients)
        return Adapter(chain(self.weights, moments, learning_rate), moments, 0, self.step + 1)

    def cleared(self) -> Adapter:
        return msgspec.structs.replace(self, gradients=0)

    def saved(self, kind: str) -> Adapter:
        match kind:
            case "snapshot":
                return self
            case "training":
                return self.cleared()
            case _:
                return Adapter(self.weights)

    def loaded(self, optimizer: bool) -> Adapter:
        return self if optimizer else Adapter(self.weights)

    @property
    def visible(self) -> int:
        """What a forward pass shows of the weights."""
        return self.weights % MODULUS


def reference_rows(operation: ForwardBackward, info: EngineInfo) -> list[tuple[bytes, bool]]:
    """(tokens of the padded row, whether it has NaN) of a request's rows in order."""
    rows = []
    for row in pack(operation, info).rows:
        tokens = np.zeros(row.length, np.int32)
        has_nan = False
        for segment in row.segments:
            datum = np.frombuffer(operation.data[segment.datum].tokens, np.int32)
            tokens[segment.offset : segment.offset + segment.length] = datum
            has_nan |= bool(datum[0] in (NAN_TOKEN, NAN_LOSS_TOKEN))
        rows.append((tokens.tobytes(), has_nan))
    return rows


def reference_sample(weights: int, prompt: bytes, seed: int, index: int, max_tokens: int) -> list[int]:
    return [chain(weights, prompt, seed, index, i) % 90 for i in range(max_tokens)]


class Storage:
    """Files by key. `damaged` keys are there and cannot be read; `is_down` makes every access fail for now."""

    def __init__(self) -> None:
        self.files: dict[str, Adapter] = {}
        #: key -> the rank of the adapter, as its files tell
        self.ranks: dict[str, int] = {}
        self.damaged: set[str] = set()
        self.is_down = False

    def write(self, key: str, adapter: Adapter) -> None:
        self.files[key] = adapter
        self.damaged.discard(key)

    def list(self, prefix: str) -> list[str]:
        """Each adapter is a folder of one file."""
        if self.is_down:
            raise StorageError(f"{prefix} could not be listed.")
        return [f"{key}/adapter" for key in self.files if key.startswith(prefix + "/")]

    def delete(self, prefix: str) -> None:
        for key in [key for key in self.files if key == prefix or key.startswith(prefix + "/")]:
            del self.files[key]
            self.damaged.discard(key)


class ChainEngine:
    """One life of a worker."""

    def __init__(self, info: EngineInfo, storage: Storage, base_weights: int = 7):
        self.info = info
        self.storage = storage
        self.base_weights = base_weights
        #: slot -> (which run's adapter it is, the adapter)
        self.training: dict[int, tuple[str, Adapter]] = {}
        #: slot -> the rank of its adapter
        self.ranks: dict[int, int] = {}
        self.samplers: dict[int, int] = {}
        #: saved in this life: loaded without waiting for its file
        self.kept: dict[str, Adapter] = {}
        self.sequences: dict[int, tuple[SequenceSpec, bytes]] = {}
        self.decoded: dict[int, int] = {}

    def execute(self, command: Command, tensors: Sequence[np.ndarray]) -> tuple[Result, list[np.ndarray]]:
        """Raises `TxError`, like an engine. The result of a save counts when `finish_save` has succeeded."""
        match command:
            case CreateAdapter(slot=slot, config=config):
                self._hold(slot, config.rank)
                self.training[slot] = (f"created {config.seed}", Adapter.created(config))
            case LoadAdapter(slot=slot, key=key, optimizer=optimizer, config=config):
                self._hold(slot, config.rank)
                self.training.pop(slot, None)
                adapter = self._read(key).loaded(optimizer)
                self.training[slot] = (key, adapter)
                return Loaded(step=adapter.step), []
            case ReleaseAdapter(slot=slot):
                self.training.pop(slot, None)
            case TrainMicroBatch():
                return self._train(command, dict(zip(TRAIN_TENSORS, tensors, strict=True)))
            case StepOptimizer(slot=slot, adam=adam):
                return self._step(slot, adam.learning_rate), []
            case SaveAdapter(slot=slot, key=key, kind=kind):
                self.storage.ranks[key] = command.config.rank
                if not command.again:
                    self.kept[key] = self._slot(slot)[1].saved(kind)
                elif key not in self.kept:
                    raise UnknownCheckpoint(f"{key} is not in memory any more.")
                return Saved(size_bytes=1), []
            case LoadSampler(sampler_slot=slot, key=key):
                self.samplers.pop(slot, None)
                weights, rank = self._read(key).weights, self.storage.ranks.get(key, 0)
                if rank > self.info.max_lora_rank:
                    return Loaded(needs_rank=rank), []
                self.samplers[slot] = weights
                return Loaded(), []
            case AdmitSequences(sequences=specs):
                for spec in specs:
                    assert spec.sequence_id not in self.sequences
                    assert spec.sampler_slot < 0 or spec.sampler_slot in self.samplers, "nothing is loaded there"
                    self.sequences[spec.sequence_id] = (spec, tensors[spec.prompt_index].tobytes())
                    self.decoded[spec.sequence_id] = 0
                assert len(self.sequences) <= self.info.num_sequences_max, "more sequences than the engine has room for"
            case CancelSequences(sequence_ids=ids):
                for sequence_id in ids:
                    self.sequences.pop(sequence_id, None)
                    self.decoded.pop(sequence_id, None)
            case SampleQuantum():
                return self._sample(command)
        return Done(), []

    def finish_save(self, key: str) -> None:
        """The files are written now. Raises `StorageError`."""
        if self.storage.is_down:
            raise StorageError(f"{key} could not be written.")
        self.storage.write(key, self.kept[key])

    def _hold(self, slot: int, rank: int) -> None:
        assert rank <= self.info.max_lora_rank, "the slots are too narrow for it"
        self.ranks[slot] = rank

    def _slot(self, slot: int) -> tuple[str, Adapter]:
        if slot not in self.training:
            raise EngineError(f"Training slot {slot} is empty.")
        return self.training[slot]

    def _read(self, key: str) -> Adapter:
        if key in self.kept:
            return self.kept[key]
        if self.storage.is_down:
            raise StorageError(f"{key} could not be read.")
        if key not in self.storage.files:
            raise UnknownCheckpoint(f"There is no checkpoint {key}.")
        if key in self.storage.damaged:
            raise CorruptedCheckpoint(f"The checkpoint {key} is damaged.")
        return self.storage.files[key]

    def _train(self, command: TrainMicroBatch, inputs: dict[str, np.ndarray]) -> tuple[Result, list[np.ndarray]]:
        assert (len(command.slots), command.row_length) in self.info.row_shapes
        logprobs = np.zeros(inputs["target_tokens"].shape, np.float32)
        losses = np.zeros(inputs["tokens"].shape, np.float32)
        classes = self.info.lora_rank_classes or (self.info.max_lora_rank,)
        assert len({class_of(self.ranks[slot], classes) for slot in command.slots if slot >= 0}) <= 1
        for r, slot in enumerate(command.slots):
            if slot < 0:
                continue
            owner, adapter = self._slot(slot)
            row = inputs["tokens"][r]
            logprobs[r] = adapter.visible
            losses[r, row == NAN_LOSS_TOKEN] = np.nan
            if not command.forward_only:
                self.training[slot] = (owner, adapter.with_row(row.tobytes(), _has_nan(row, inputs["segment_ids"][r])))
        return Trained(), [logprobs, losses]

    def _step(self, slot: int, learning_rate: float) -> Stepped:
        owner, adapter = self._slot(slot)
        if adapter.gradients == -1:
            self.training[slot] = (owner, adapter.cleared())
            raise NonFiniteGradients()
        self.training[slot] = (owner, adapter.stepped(learning_rate))
        return Stepped(metrics={"weights": float(self.training[slot][1].visible)}, step=self.training[slot][1].step)

    def _sample(self, quantum: SampleQuantum) -> tuple[Result, list[np.ndarray]]:
        steps = quantum.decode_steps
        tensors: list[np.ndarray] = []
        finished: list[FinishedSequence] = []
        pieces: list[SequencePiece] = []
        progress: list[tuple[int, int]] = []
        decoding = list(self.sequences.items())
        if quantum.only_first_tokens:
            decoding = [item for item in decoding if item[1][0].stream and not self.decoded[item[0]]] or decoding
        for sequence_id, (spec, prompt) in decoding:
            start = self.decoded[sequence_id]
            self.decoded[sequence_id] += steps
            progress.append((sequence_id, steps))
            has_ended = self.decoded[sequence_id] >= spec.max_tokens
            if not (has_ended or spec.stream):
                continue
            weights = self.base_weights if spec.sampler_slot < 0 else self.samplers[spec.sampler_slot]
            tokens = reference_sample(weights, prompt, spec.seed, spec.sample_index, spec.max_tokens)
            tokens = tokens if has_ended else tokens[start : start + steps]
            tensors += [np.array(tokens, np.int32), np.zeros(len(tokens), np.float32)]
            indices = {"tokens_index": len(tensors) - 2, "logprobs_index": len(tensors) - 1}
            if has_ended:
                finished.append(FinishedSequence(sequence_id=sequence_id, stop_reason="length", **indices))
                del self.sequences[sequence_id], self.decoded[sequence_id]
            else:
                pieces.append(SequencePiece(sequence_id=sequence_id, start=start, **indices))
        return Sampled(finished=tuple(finished), progress=tuple(progress), pieces=tuple(pieces)), tensors


def _has_nan(tokens: np.ndarray, segment_ids: np.ndarray) -> bool:
    starts = np.flatnonzero(np.diff(segment_ids, prepend=0) > 0)
    return not {NAN_TOKEN, NAN_LOSS_TOKEN}.isdisjoint(tokens[starts].tolist())
