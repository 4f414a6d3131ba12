"""An engine without JAX: deterministic, small, fast, and a real participant in everything but the mathematics of
transformers.

Its "model" knows two things of a token: which token precedes it, and its class (`token % FEATURES`). With b a fixed
hash of the pair and w the adapter's FEATURES numbers, log p(token | previous) = log sigmoid(b + w[class]). That is
little, and enough: training lowers the loss, Adam has moments, sampling agrees with `forward`, adapters differ, and a
state that was restored wrongly is noticed. Sums are formed in row order, so results are the same bits every time.
Of what shapes a distribution it knows `min_tokens`, and a `logit_bias` of 100 (always) or -100 (never).

`Faults` makes it slow, stall, fail or die where a test wants that. `create` is the factory for worker processes;
there the faults come from the environment variable `FAKE_ENGINE` (JSON).
"""

from __future__ import annotations

import collections
import copy
import io
import os
import time
from collections.abc import Sequence

import msgspec
import numpy as np
from safetensors.numpy import load as load_safetensors

from tx_async.age import encrypted
from tx_async.errors import (
    BaseModelError,
    Category,
    CorruptedCheckpoint,
    EngineError,
    InvalidRequest,
    TxError,
    UnknownCheckpoint,
)
from tx_async.storage.checkpoint_files import read_checkpoint_sync, write_checkpoint_sync
from tx_async.storage.store import Store
from tx_async.testing.fake_model import (
    CONTEXT,
    FEATURES,
    PEFT_FILE,
    VOCAB_SIZE,
    Adapter,
    FakeSequence,
    allowed,
    ends_with,
    hash_of,
    optim_step,
    peft_files,
    read_base_model,
    row_loss,
    weights_of,
)
from tx_async.testing.fake_replies import FakeReply
from tx_async.testing.faults import FAULTS_VARIABLE, Faults
from tx_async.wire.worker import (
    BASE_SLOT,
    TRAIN_TENSORS,
    AdmitSequences,
    CancelSequences,
    Command,
    CreateAdapter,
    Done,
    EngineConfig,
    EngineInfo,
    FinishedSequence,
    Heartbeat,
    LoadAdapter,
    Loaded,
    LoadSampler,
    ReleaseAdapter,
    Sampled,
    SampleQuantum,
    SaveAdapter,
    Saved,
    SequencePiece,
    SequenceSpec,
    StepOptimizer,
    Trained,
    TrainMicroBatch,
    Welcome,
)
from tx_async.worker.engine_api import Pending, Reply, ReportProgress

ADAPTER_FILE = "fake_adapter.npz"
ROW_LENGTHS = (32, 128, 1024)
MICRO_BATCH_TOKENS = 1024


def create(welcome: Welcome, progress: ReportProgress) -> FakeEngine:
    """The factory for `tx-async worker --engine tx_async.testing.fake_engine:create`."""
    faults = msgspec.json.decode(os.environ.get(FAULTS_VARIABLE, "{}"), type=Faults)
    if faults.process_id not in (-1, welcome.process_id):
        faults = Faults()
    if faults.base_model_error:
        raise BaseModelError(faults.base_model_error)
    for step in range(5):
        progress("loading weights", step, 5)
        time.sleep(faults.load_ms / 5000)
    if faults.load_error and faults.is_due():
        raise RuntimeError(faults.load_error)
    vocab_size, context = read_base_model(welcome.base_model)
    return FakeEngine(
        welcome.engine,
        welcome.checkpoints_base,
        storage_id=welcome.storage_id,
        vocab_size=vocab_size,
        context=context,
        faults=faults,
    )


class FakeEngine:
    """Implements `worker.engine_api.Engine`. Checkpoints are files under `checkpoints_base` ("" keeps them in
    memory)."""

    def __init__(
        self,
        config: EngineConfig | None = None,
        checkpoints_base: str = "",
        *,
        storage_id: str = "",
        vocab_size: int = VOCAB_SIZE,
        context: int = CONTEXT,
        faults: Faults | None = None,
    ):
        self.config = config or EngineConfig()
        self.faults = faults or Faults()
        self.num_commands = 0
        self._vocab_size = vocab_size
        self._context = min(context, self.config.max_context_length or context)
        self._store = Store(checkpoints_base, storage_id) if checkpoints_base else None
        #: checkpoints by key, when there is no folder for them
        self.files: dict[str, bytes] = {}
        #: by key, what storage did not take
        self._unwritten: dict[str, Adapter] = {}
        self._training: dict[int, Adapter] = {}
        self._samplers: dict[int, Adapter] = {}
        #: admitted, in order; the first `num_sequences_max` of them are running
        self._sequences: collections.OrderedDict[int, FakeSequence] = collections.OrderedDict()

    def info(self) -> EngineInfo:
        lengths = self.config.train_row_lengths or tuple(
            sorted({min(length, self._context) for length in (*ROW_LENGTHS, self._context)})
        )
        tokens = self.config.train_micro_batch_tokens or max(MICRO_BATCH_TOKENS, lengths[-1])
        rows = self.config.train_micro_batch_size
        return EngineInfo(
            vocab_size=self._vocab_size,
            max_context_length=self._context,
            row_shapes=tuple((rows or max(1, tokens // length), length) for length in lengths),
            row_length_preferred=lengths[-1],
            target_tokens_k=(1, 8, 128, 4097),
            num_training_slots=self.config.max_lora_adapters,
            num_sampler_slots=self.config.max_sampler_adapters,
            max_lora_rank=self.config.max_lora_rank,
            num_sequences_max=self.config.sample_max_num_sequences,
            decode_steps=self.config.decode_steps or 8,
            prefill_tokens=self.config.prefill_chunk_tokens or 1024,
            adapter_bytes=5 * 4 * FEATURES,
            kv_cache_tokens=self.config.sample_max_num_sequences * self._context,
        )

    def vitals(self) -> Heartbeat:
        return Heartbeat()

    def close(self) -> None:
        self._sequences.clear()

    def execute(self, command: Command, tensors: Sequence[np.ndarray]) -> Pending:
        self.num_commands += 1
        self.faults.strike(self.num_commands)
        reply = self._run(command, tensors)

        def pending() -> Reply:
            if self.faults.command_ms:
                time.sleep(self.faults.command_ms / 1000)
            return reply

        return pending

    def _run(self, command: Command, tensors: Sequence[np.ndarray]) -> Reply:
        match command:
            case CreateAdapter(slot=slot):
                self._training[slot] = Adapter()
            case ReleaseAdapter(slot=slot):
                self._training.pop(slot, None)
            case LoadAdapter(slot=slot, key=key, optimizer=optimizer):
                self._training.pop(slot, None)
                loaded = self._load(key)
                self._training[slot] = loaded if optimizer else Adapter(w=loaded.w)
                return Loaded(step=self._training[slot].step), []
            case SaveAdapter(slot=slot, key=key):
                adapter = self._unwritten_adapter(key) if command.again else self._adapter(slot)
                return Saved(size_bytes=self._save(adapter, command)), []
            case LoadSampler(sampler_slot=slot, key=key):
                self._samplers.pop(slot, None)
                self._samplers[slot] = self._load(key)
                return Loaded(step=self._samplers[slot].step), []
            case TrainMicroBatch():
                return self._train(command, dict(zip(TRAIN_TENSORS, tensors, strict=True)))
            case StepOptimizer(slot=slot, adam=adam):
                return optim_step(self._adapter(slot), adam), []
            case AdmitSequences(sequences=sequences):
                for spec in sequences:
                    self._admit(spec, tensors)
            case CancelSequences(sequence_ids=ids):
                for sequence_id in ids:
                    self._sequences.pop(sequence_id, None)
            case SampleQuantum():
                return self._sample(command)
        return Done(), []

    def _adapter(self, slot: int) -> Adapter:
        if slot not in self._training:
            raise EngineError(f"Training slot {slot} is empty.")
        return self._training[slot]

    # ---- checkpoints

    def _unwritten_adapter(self, key: str) -> Adapter:
        if key not in self._unwritten:
            raise UnknownCheckpoint(f"The adapter {key} is not in memory any more.")
        return self._unwritten[key]

    def _save(self, adapter: Adapter, command: SaveAdapter) -> int:
        key, kind = command.key, command.kind
        arrays = {"w": adapter.w, "step": np.int64(adapter.step)}
        if kind in ("training", "snapshot"):
            arrays |= {"m": adapter.m, "v": adapter.v}
        if kind == "snapshot":
            arrays["grad"] = adapter.grad
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        data = buffer.getvalue()
        if self._store is not None:
            files = encrypted({ADAPTER_FILE: data, **peft_files(adapter.w)}, command.age_recipients)
            told = {"kind": kind, "adapter": msgspec.to_builtins(command.config), "step": adapter.step}
            self._unwritten[key] = copy.deepcopy(adapter)
            write_checkpoint_sync(self._store, key, files, command.metadata | told)
            del self._unwritten[key]
        else:
            self.files[key] = data
        return len(data)

    def _load(self, key: str) -> Adapter:
        if self._store is not None:
            files = read_checkpoint_sync(self._store, key)[1]
            if ADAPTER_FILE not in files:
                return Adapter(w=weights_of(load_safetensors(files[PEFT_FILE])))
            data = files[ADAPTER_FILE]
        elif key in self.files:
            data = self.files[key]
        else:
            raise UnknownCheckpoint(f"There is no checkpoint {key}.")
        try:
            arrays = dict(np.load(io.BytesIO(data)))
        except Exception as error:  # numpy and zipfile raise what they like for damaged files
            raise CorruptedCheckpoint(f"The files of {key} are damaged: {error}") from error
        step = int(arrays.pop("step"))
        return Adapter(**arrays, step=step)

    # ---- training

    def _train(self, command: TrainMicroBatch, inputs: dict[str, np.ndarray]) -> Reply:
        logprobs = np.zeros(inputs["target_tokens"].shape, np.float32)  # [R, L, K]
        losses = np.zeros(inputs["tokens"].shape, np.float32)  # [R, L]
        for row, slot in enumerate(command.slots):
            if slot >= 0:
                adapter = self._adapter(slot)
                row_inputs = {name: array[row] for name, array in inputs.items()}
                logprobs[row], losses[row], grad = row_loss(adapter.w, row_inputs)
                if not command.forward_only:
                    adapter.grad += grad
        return Trained(), [logprobs, losses]

    # ---- sampling

    def _admit(self, spec: SequenceSpec, tensors: Sequence[np.ndarray]) -> None:
        scores = spec.prompt_scores
        targets = tensors[scores.targets_index].copy() if scores and scores.targets_index >= 0 else None
        self._sequences[spec.sequence_id] = FakeSequence(
            spec, tensors[spec.prompt_index].copy(), targets, time.monotonic()
        )

    def _sample(self, quantum: SampleQuantum) -> Reply:
        finished: list[FinishedSequence] = []
        failed: list[tuple[int, Category, str]] = []
        progress: list[tuple[int, int]] = []
        pieces: list[SequencePiece] = []
        tensors: list[np.ndarray] = []
        began_at = time.monotonic()
        running = list(self._sequences.values())[: self.config.sample_max_num_sequences]
        newcomers = [sequence for sequence in running if sequence.spec.stream and not sequence.tokens]
        budget = quantum.prefill_tokens
        for sequence in newcomers if quantum.only_first_tokens and newcomers else running:
            chunk = min(budget, len(sequence.prompt) - sequence.prefilled)
            sequence.prefilled += chunk
            budget -= chunk
            if sequence.prefilled < len(sequence.prompt):
                if chunk:
                    progress.append((sequence.spec.sequence_id, chunk))
                continue
            start = len(sequence.tokens)
            try:
                stop_reason = self._decode(sequence, quantum.decode_steps)
                sequence.quanta.append((began_at, time.monotonic()))
            except TxError as error:
                del self._sequences[sequence.spec.sequence_id]
                failed.append((sequence.spec.sequence_id, error.category, error.message))
                continue
            progress.append((sequence.spec.sequence_id, chunk + len(sequence.tokens) - start))
            if stop_reason:
                del self._sequences[sequence.spec.sequence_id]
                finished.append(self._finish(sequence, stop_reason, tensors))
            elif sequence.spec.stream and len(sequence.tokens) > start:
                said = FakeReply(sequence, self._weights(sequence.spec), self._vocab_size, tensors)
                pieces.append(said.piece(start))
        num_running = sum(sequence.prefilled == len(sequence.prompt) for sequence in self._sequences.values())
        result = Sampled(
            finished=tuple(finished),
            failed=tuple(failed),
            progress=tuple(progress),
            num_running=num_running,
            num_waiting=len(self._sequences) - num_running,
            num_prefilled_tokens=quantum.prefill_tokens - budget,
            pieces=tuple(pieces),
            num_kv_tokens=sum(len(s.prompt) + len(s.tokens) for s in self._sequences.values()),
        )
        return result, tensors

    def _finish(self, sequence: FakeSequence, stop_reason: str, tensors: list[np.ndarray]) -> FinishedSequence:
        return FakeReply(sequence, self._weights(sequence.spec), self._vocab_size, tensors).finished(stop_reason)

    def complete(self, spec: SequenceSpec, prompt: np.ndarray) -> tuple[FinishedSequence, list[np.ndarray]]:
        """A whole sequence at once, beside all others."""
        sequence, tensors = FakeSequence(spec, prompt, None, time.monotonic()), []
        stop_reason = self._decode(sequence, spec.max_tokens)
        return self._finish(sequence, stop_reason or "length", tensors), tensors

    def load_peft(self, slot: int, data: bytes, without: Sequence[str] = ()) -> None:
        """Fill a sampler slot from a PEFT file, without tensors whose names have one of these parts."""
        self._samplers[slot] = Adapter(w=weights_of(load_safetensors(data), without))

    def _decode(self, sequence: FakeSequence, decode_steps: int) -> str | None:
        """Append up to `decode_steps` tokens; the reason, when one of them was the last."""
        if sequence.spec.grammar:
            raise InvalidRequest("This engine knows no grammars.")
        spec = sequence.spec
        for _ in range(decode_steps):
            if len(sequence.tokens) >= spec.max_tokens:
                return "length"
            token = allowed(spec, len(sequence.tokens), self._next_token(sequence), self._vocab_size)
            sequence.tokens.append(token)
            if token in spec.stop_token_ids or ends_with(sequence.tokens[spec.min_tokens :], spec.stop_strings):
                return "stop"
        return "length" if len(sequence.tokens) >= spec.max_tokens else None

    def _next_token(self, sequence: FakeSequence) -> int:
        spec = sequence.spec
        previous = sequence.tokens[-1] if sequence.tokens else int(sequence.prompt[-1])
        random = (spec.seed, spec.sample_index, len(sequence.tokens)) if spec.temperature > 0 else ()
        return hash_of(previous, int(np.argmax(self._weights(spec))), *random) % self._vocab_size

    def _weights(self, spec: SequenceSpec) -> np.ndarray:
        if spec.sampler_slot == BASE_SLOT:
            return np.zeros(FEATURES, np.float32)
        if spec.sampler_slot not in self._samplers:
            raise EngineError(f"Sampler slot {spec.sampler_slot} is empty.")
        return self._samplers[spec.sampler_slot].w
