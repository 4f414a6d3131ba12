"""The engine: the base model and every adapter on the device, driven by one ordered stream of commands.

`Engine.execute` changes host-side state and issues device work; it waits for nothing. The returned `Pending` waits,
on another thread. Training lives here; sampling in `decode.py`; each program in the file named after what it computes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from msgspec import structs

from tx_async.engine import adapter_slots, batch, compilation, memory_plan, mesh, optimizer, platform, train
from tx_async.engine.adapter_slots import Creation, SamplerAdapters, TrainingState, pad
from tx_async.engine.ahead import is_rare, likeliest
from tx_async.engine.allocation import Allocate, on_device
from tx_async.engine.batch import RowBatch, row_batch
from tx_async.engine.checkpoints import Checkpoints, NeedsWiderSlots, SavedAdapter, check_same
from tx_async.engine.compilation import CompilationCounter, Program
from tx_async.engine.decode import SamplingEngine
from tx_async.engine.executables import Executables
from tx_async.engine.kernel_uses import choose_for, uses
from tx_async.engine.kernels import Kernels
from tx_async.engine.memory_plan import MemoryPlan
from tx_async.engine.optimizer import Adam, StepOutcome, not_taken_because
from tx_async.engine.platform import Platform
from tx_async.engine.row_shapes import preferred_row_length, row_shapes
from tx_async.engine.streams import OwnStream, SameStream
from tx_async.engine.transfers import Transfers
from tx_async.errors import InvalidRequest, NonFiniteGradients, TxError
from tx_async.fingerprint import fingerprint
from tx_async.layers.residuals import Recompute
from tx_async.models.decoder import Decoder, layers_apart
from tx_async.models.load import fetch, load_model
from tx_async.storage.store import Store
from tx_async.wire import worker as wire
from tx_async.wire.operations import SUPPORT_TOKENS_MAX
from tx_async.wire.ranks import class_of, rank_classes, shared_classes
from tx_async.wire.worker import EngineConfig, EngineInfo, Heartbeat, Welcome
from tx_async.worker.engine_api import Pending, Reply, ReportProgress

TARGETS_PER_TOKEN = (1, 8, 32, 128)
WIDE_TARGETS_PER_TOKEN = (1_024, 1 + SUPPORT_TOKENS_MAX)
"""For stable_reinforce where top-k or top-p has left many tokens: compiled when somebody first trains on such data."""
REMAT_TOKENS = 16_384
"""Where nobody planned the memory, micro-batches of more tokens on a device recompute each layer in the backward
pass."""

log = logging.getLogger(__name__)


def create(welcome: Welcome, progress: ReportProgress) -> JaxEngine:
    """Load the base model and make every slot. Raises `BaseModelError` and `ConfigError`."""
    config = welcome.engine
    compilation.use_cache(config.compilation_cache_dir)
    devices = mesh.build(config, welcome.process_id, progress)
    here = platform.current()
    dtype = config.dtype or here.dtype
    folder = fetch(welcome.base_model)
    model, params = load_model(folder, dtype, progress, devices, config.max_context_length)
    store = Store(welcome.checkpoints_base, welcome.storage_id)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    # Processes of a mesh must agree, and their hosts may have different memory left.
    left = platform.available_memory() if model.mesh is None else 0
    limit = memory_plan.lora_rank_limit(model, config, here, memory, left)
    config = memory_plan.with_slots_for(structs.replace(config, max_lora_rank=limit), welcome.lora_rank)
    kernels = choose_for(model, here)
    planned = memory_plan.of_device(model, config, here, memory, kernels)
    given = fingerprint(folder), here, planned, kernels
    engine = JaxEngine(model, params, config, folder, store, *given, lora_rank_limit=limit)
    if config.compilation_cache_dir and here.keeps_executables and model.mesh is None:
        engine.keep_executables(Executables(Path(config.compilation_cache_dir) / "executables"))
    if config.compile_ahead or here.compiles_ahead:
        engine.compile_ahead(progress, everything=config.compile_ahead)
    return engine


class JaxEngine:
    """Commands change `training`, `ranks`, `samplers`, and what `checkpoints` and `sampling` own."""

    def __init__(
        self,
        model: Decoder,
        params: Any,
        config: EngineConfig,
        folder: Path,
        store: Store,
        base_model_digest: str = "",
        on: Platform | None = None,
        planned: MemoryPlan | None = None,
        kernels: Kernels | None = None,
        allocate: Allocate = on_device,
        lora_rank_limit: int = 0,
    ):
        """config: its `max_lora_rank` is the rank of the slots; folder: the base model's; base_model_digest: of the
        folder's contents, for hosts that must have the same; on: the platform, None = where JAX runs; planned: the
        memory plan, None = as configured; kernels: what runs in place of the plain versions, None = what runs on this
        device; allocate: how arrays are made; lora_rank_limit: the highest rank for which another start could have
        slots, 0 = that of these."""
        self.platform = on or platform.current()
        self._counter = CompilationCounter()
        self.base_model_digest = base_model_digest
        apart = self.platform.layers_apart
        if apart:
            params = layers_apart(params)
        self.model, self.params = model, params
        self.context = min(model.max_position_embeddings, config.max_context_length or model.max_position_embeddings)
        self.memory = planned
        self.kernels = kernels or choose_for(model, self.platform)
        if planned:
            self.context = min(self.context, planned.context)
            config = structs.replace(
                config,
                kv_cache_tokens=planned.kv_cache_tokens,
                max_lora_adapters=planned.num_training_slots,
                max_sampler_adapters=planned.num_sampler_slots,
            )
        self.config = config
        self.targets: adapter_slots.Targets = model.lora_targets()
        #: the sharding of results: every device has them whole; None without a mesh
        self.replicated = NamedSharding(model.mesh, PartitionSpec()) if model.mesh else None
        #: the shardings of adapters in training and in sampling
        self.cut: Any = mesh.training_shardings(model, model.mesh) if model.mesh else None
        self.cut_state = TrainingState(*4 * (self.cut,), self.replicated) if model.mesh else None  # type: ignore[arg-type]
        self.transfers = Transfers(self.cut_state, config.num_processes)
        #: the adapter that was read from a slot last
        self._read_last: SavedAdapter | None = None
        of_samplers: Any = mesh.adapter_shardings(model, model.mesh) if model.mesh else None
        self.num_slots = config.max_lora_adapters
        self.row_shapes = row_shapes(config, self.context, self.platform)
        if planned:
            self.row_shapes = tuple((shape.rows, shape.length) for shape in planned.row_shapes)
        #: One slot more than adapters: the last one takes the gradients of unused rows.
        self.training = adapter_slots.zeros(
            self.targets, self.num_slots + 1, config.max_lora_rank, self.cut_state, allocate
        )
        #: the rank of the adapter in each training slot; 0 where none was created yet
        self.ranks = np.zeros(self.num_slots + 1, np.int32)
        self.lora_rank_limit = lora_rank_limit or config.max_lora_rank
        writes = jax.process_index() == 0
        self.checkpoints = Checkpoints(store, model, config.max_lora_rank, self.lora_rank_limit, writes=writes)
        dtype = jax.tree.leaves(params)[0].dtype
        num_slots, rank = config.max_sampler_adapters, config.max_lora_rank
        self.samplers = SamplerAdapters(self.targets, num_slots, rank, of_samplers, allocate, dtype, apart)
        self.overlaps = self.platform.overlaps and model.mesh is None
        stream = OwnStream("sampling") if self.overlaps else SameStream()
        lora, handed_in = self.samplers, (self.platform, allocate, self.kernels)
        self.sampling = SamplingEngine(
            model, params, config, self.context, str(folder), lora.weights, lora.scale, stream, *handed_in
        )
        #: which of the kernels run for this model, and where the plain versions do
        self.kernel_uses = uses(self.kernels, model, config, self.platform, model.mesh, dtype)
        self._programs = _programs(self)

    def __repr__(self) -> str:
        used = np.count_nonzero(self.ranks)
        return f"<JaxEngine [{used}/{self.num_slots} training slots used | {self.num_compilations} programs compiled]>"

    def info(self) -> EngineInfo:
        return EngineInfo(
            vocab_size=self.model.vocab_size,
            max_context_length=self.context,
            row_shapes=self.row_shapes,
            row_length_preferred=preferred_row_length(self.row_shapes),
            target_tokens_k=(*TARGETS_PER_TOKEN, *WIDE_TARGETS_PER_TOKEN),
            num_training_slots=self.num_slots,
            num_sampler_slots=self.config.max_sampler_adapters,
            max_lora_rank=self.config.max_lora_rank,
            num_sequences_max=self.config.sample_max_num_sequences,
            decode_steps=self.sampling.decode_steps,
            prefill_tokens=self.sampling.prefill_tokens,
            num_devices=jax.device_count(),
            platform=self.platform.name,
            # In that time every device along `fsdp` could have computed positions of its own.
            micro_batch_overhead=self.platform.micro_batch_overhead * self.config.fully_sharded_data_parallel_size,
            memory=self.memory.parts if self.memory else (),
            kernels=tuple((use.task, use.runs) for use in self.kernel_uses),
            kernels_plain=tuple((use.task, use.plain) for use in self.kernel_uses if use.plain),
            overlaps=self.overlaps,
            adapter_bytes=adapter_slots.slot_bytes(self.targets, self.config.max_lora_rank),
            base_model_digest=self.base_model_digest,
            dtype=str(self.params["embed"].dtype),
            kv_cache_tokens=self.sampling.kv_cache_tokens,
            lora_rank_limit=self.lora_rank_limit,
            lora_rank_classes=shared_classes(self.config.max_lora_rank),
        )

    def recompute(self, rows: int, length: int) -> Recompute:
        """What a micro-batch of that shape computes again in its backward pass."""
        if self.memory:
            return next(x.recompute for x in self.memory.row_shapes if (x.rows, x.length) == (rows, length))
        tokens = rows // self.config.fully_sharded_data_parallel_size * length
        return Recompute(int(self.config.gradient_checkpointing or tokens > REMAT_TOKENS))

    @property
    def num_compilations(self) -> int:
        return self._counter.count

    def vitals(self) -> Heartbeat:
        used, most = platform.device_memory()
        return Heartbeat(
            num_compilations=self._counter.count,
            compile_s=self._counter.seconds,
            device_bytes=used,
            device_bytes_max=most,
        )

    def close(self) -> None:
        self.sampling.stream.close()
        self._counter.close()

    @property
    def programs(self) -> list[Program]:
        """Every program of both halves."""
        return [*self._programs.values(), *self.sampling.programs.values()]

    def keep_executables(self, kept: Executables) -> None:
        for program in self.programs:
            program.executables = kept

    def compile_ahead(self, progress: ReportProgress, everything: bool = True) -> None:
        """Compile every program of both halves now, or only the likeliest."""
        common = [program for program in self.programs if not is_rare(program.name)]
        names = set(likeliest([program.name for program in common]))
        programs = [program for program in common if everything or program.name in names]
        with ThreadPoolExecutor(self.platform.compile_threads) as pool:
            for done, _ in enumerate(pool.map(Program.compile, programs)):
                progress("compiling", done, len(programs))
        progress("compiling", len(programs), len(programs))

    def execute(self, command: wire.Command, tensors: Sequence[np.ndarray]) -> Pending:
        try:
            return self._execute(command, tensors)
        except TxError as error:
            return partial(_fail, error)

    def _execute(self, command: wire.Command, tensors: Sequence[np.ndarray]) -> Pending:
        match command:
            case wire.TrainMicroBatch():
                return self._train(command, tensors)
            case wire.StepOptimizer():
                return self._optim_step(command)
            case wire.CreateAdapter():
                return self._create_adapter(command)
            case wire.LoadAdapter():
                return self._load_adapter(command)
            case wire.ReleaseAdapter():
                return _done
            case wire.SaveAdapter():
                return self._save_adapter(command)
            case wire.LoadSampler():
                return self._load_sampler(command)
            case wire.AdmitSequences():
                self.sampling.admit(command.sequences, tensors, self.samplers.scale != 0)
                return _done
            case wire.CancelSequences():
                self.sampling.cancel(command.sequence_ids)
                return _done
            case wire.SampleQuantum():
                return self.sampling.quantum(command, self.samplers.weights, self.samplers.scale)

    # ---- training

    def _train(self, command: wire.TrainMicroBatch, tensors: Sequence[np.ndarray]) -> Pending:
        batch, rank = row_batch(command, tensors, self.ranks, self.model.vocab_size)
        rows, length, k = len(command.slots), command.row_length, command.targets_per_token
        rank = class_of(rank, train_ranks(rows, self.config.max_lora_rank))
        program = self._programs[train_program(rows, length, k, rank, command.forward_only)]
        if command.forward_only:
            logprobs, losses = program(self.params, self.training.weights, batch)
        else:
            gradients, logprobs, losses = program(self.params, self.training.weights, self.training.gradients, batch)
            self.training = self.training._replace(gradients=gradients)
        return lambda: (wire.Trained(), [np.asarray(logprobs), np.asarray(losses)])

    def _optim_step(self, command: wire.StepOptimizer) -> Pending:
        rank = class_of(self.ranks[command.slot], rank_classes(self.config.max_lora_rank))
        program, adam = self._programs[optim_program(rank)], Adam.of(command.adam)
        self.training, outcome = program(self.training, np.int32(command.slot), adam)
        return partial(_stepped, outcome, command.adam.learning_rate)

    def _create_adapter(self, command: wire.CreateAdapter) -> Pending:
        self.ranks[command.slot] = command.config.rank
        creation = Creation.of(command.config)
        self.training = self._programs["create_adapter"](self.training, np.int32(command.slot), creation)
        return _done

    # ---- checkpoints

    def _load_adapter(self, command: wire.LoadAdapter) -> Pending:
        try:
            return self._load_into_slot(command)
        except TxError:
            # The slot holds another run's adapter: no command that is already on its way may take it for this run's.
            self._create_adapter(wire.CreateAdapter(slot=command.slot, config=command.config))
            raise

    def _load_into_slot(self, command: wire.LoadAdapter) -> Pending:
        saved = self.checkpoints.load(command.key)
        check_same(command.key, saved.config, command.config)
        found = self._whole_state(command.key, saved) if command.optimizer else saved.weights
        program = self._programs["load_state" if command.optimizer else "load_weights"]
        self.training = program(self.training, np.int32(command.slot), self.transfers.to_devices(found))
        self.ranks[command.slot] = command.config.rank
        return partial(_loaded, saved.step if command.optimizer else 0)

    def _whole_state(self, key: str, saved: SavedAdapter) -> TrainingState:
        if saved.m is None or saved.v is None:
            raise InvalidRequest(f"The checkpoint {key} holds no optimizer state: load only its weights.")
        gradients: Any = saved.gradients or pad(self.targets, {}, self.config.max_lora_rank)
        return TrainingState(saved.weights, saved.m, saved.v, gradients, saved.step)

    def _save_adapter(self, command: wire.SaveAdapter) -> Pending:
        saved = self.checkpoints.kept(command.key) if command.again else self._read_slot(command)
        if not command.age_recipients:  # an encrypted checkpoint is for others, and nothing here loads it
            self.checkpoints.keep(command.key, saved)
        write = partial(self.checkpoints.write, command.key, saved, command.metadata, command.age_recipients)
        return lambda: (wire.Saved(size_bytes=write()), [])

    def _read_slot(self, command: wire.SaveAdapter) -> SavedAdapter:
        if self._read_last:
            self._read_last.to_host()  # one at a time is what the memory plan has room for
        slot, of = np.int32(command.slot), (command.kind, command.config)
        if command.kind in ("training", "snapshot"):
            state: TrainingState = self._programs["read_state"](self.training, slot)
            gradients = state.gradients if command.kind == "snapshot" else None
            self._read_last = SavedAdapter(*of, state.weights, state.m, state.v, gradients, state.step)
        else:
            self._read_last = SavedAdapter(*of, self._programs["read_weights"](self.training.weights, slot))
        return self._read_last

    def _load_sampler(self, command: wire.LoadSampler) -> Pending:
        try:
            saved = self.checkpoints.load(command.key)
        except NeedsWiderSlots as error:
            return partial(_needs, error.rank)
        slot = command.sampler_slot
        program = self._programs["load_sampler"]
        one = self.transfers.to_devices(saved.weights)
        weights = self.sampling.stream.run(program, self.samplers.weights, np.int32(slot), one)
        self.samplers.load(slot, weights, adapter_slots.lora_scale(saved.config.rank))
        return partial(_loaded, 0)


def train_ranks(rows: int, max_rank: int) -> tuple[int, ...]:
    """The ranks that training programs are compiled for, ascending; lower ones run padded."""
    return rank_classes(max_rank) if rows == 1 else shared_classes(max_rank)


def optim_program(rank: int) -> str:
    """The name of the program of an optimizer step for adapters up to this rank."""
    return f"optim_step rank={rank}"


def train_program(rows: int, length: int, k: int, rank: int, forward_only: bool) -> str:
    """The name of the program of a micro-batch: its shape, K targets per token, adapters up to this rank."""
    return f"{'forward' if forward_only else 'forward_backward'} {rows}x{length} K={k} rank={rank}"


def _programs(engine: JaxEngine) -> dict[str, Program]:
    """Every program of the training half. Shapes and names are all known here."""
    state, slot = engine.training, np.int32(0)
    one = engine.transfers.described(jax.eval_shape(adapter_slots.read_state, state, slot))
    adam, creation = Adam.of(wire.AdamParams()), Creation.of(wire.AdapterConfig(rank=1))
    create_adapter = partial(adapter_slots.create_adapter, engine.targets)
    samplers, whole, cut_state = engine.samplers, engine.replicated, engine.cut_state
    changes = partial(Program, donate=(0,), out_shardings=cut_state)
    listed = [
        *_train_programs(engine),
        *(
            Program(
                optim_program(rank),
                partial(optimizer.optim_step, rank=rank),
                (state, slot, adam),
                donate=(0,),
                out_shardings=(cut_state, whole),
            )
            for rank in rank_classes(engine.config.max_lora_rank)
        ),
        changes("create_adapter", create_adapter, (state, slot, creation)),
        Program("read_state", adapter_slots.read_state, (state, slot), out_shardings=engine.transfers.state),
        Program("read_weights", adapter_slots.read_slot, (state.weights, slot), out_shardings=engine.transfers.weights),
        changes("load_state", adapter_slots.write_state, (state, slot, one)),
        changes("load_weights", adapter_slots.load_weights, (state, slot, one.weights)),
        Program(
            "load_sampler",
            samplers.write,
            (samplers.weights, slot, one.weights),
            donate=(0,),
            out_shardings=samplers.sharding,
        ),
    ]
    return {program.name: program for program in listed}


def _train_programs(engine: JaxEngine) -> Iterator[Program]:
    state, whole = engine.training, engine.replicated
    for rows, length in engine.row_shapes:
        recompute = engine.recompute(rows, length)
        targets = (*TARGETS_PER_TOKEN, *WIDE_TARGETS_PER_TOKEN)
        for k, rank in product(targets, train_ranks(rows, engine.config.max_lora_rank)):
            of_batch = RowBatch(**batch.shapes(rows, length, k))  # type: ignore[arg-type]
            yield Program(
                train_program(rows, length, k, rank, forward_only=True),
                partial(train.forward, engine.platform, engine.kernels, engine.model, rank),
                (engine.params, state.weights, of_batch),
                out_shardings=whole,
            )
            yield Program(
                train_program(rows, length, k, rank, forward_only=False),
                partial(train.forward_backward, engine.platform, engine.kernels, engine.model, rank, recompute),
                (engine.params, state.weights, state.gradients, of_batch),
                donate=(2,),
                out_shardings=(engine.cut, whole, whole),
            )


def _stepped(outcome: StepOutcome, learning_rate: float) -> Reply:
    taken, norm, step = (np.asarray(x) for x in outcome)
    if not taken:
        raise NonFiniteGradients(not_taken_because(float(norm)))
    metrics = {"grad_norm": float(norm), "learning_rate": learning_rate, "step": float(step)}
    return wire.Stepped(metrics=metrics, step=int(step)), []


def _loaded(step: Any) -> Reply:
    return wire.Loaded(step=int(step)), []


def _needs(rank: int) -> Reply:
    return wire.Loaded(needs_rank=rank), []


def _done() -> Reply:
    return wire.Done(), []


def _fail(error: TxError) -> Reply:
    raise error
