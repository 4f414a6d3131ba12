"""Sampling: sequences are admitted, prefilled, decoded in quanta, and leave.

`quantum` first finishes the host's part of the previous quantum (which needs that quantum's tokens), then schedules,
then dispatches without waiting: the device works while the caller goes on. So the host's state is a function of the
command stream alone, and only the page pools live on the device between two quanta. `Pending` waits for the tokens, on
another thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from tx_async.engine import decode_programs as programs
from tx_async.engine import heads
from tx_async.engine.allocation import Allocate, on_device
from tx_async.engine.compilation import Program, row_independent
from tx_async.engine.decode_batches import (
    ScoringPiece,
    batch_sizes,
    bucket,
    decode_batch,
    empty_scores,
    prefill_batch,
    prefill_calls,
    score_batches,
)
from tx_async.engine.decode_programs import Adapters, Decoded
from tx_async.engine.endings import ending, obey
from tx_async.engine.kernels import NO_KERNELS, Kernels
from tx_async.engine.kv_cache import (
    CACHE_PART,
    CacheLayout,
    Pools,
    copy_pages,
    pool_shardings,
    state_slots,
    token_bytes,
)
from tx_async.engine.paging import Paging, tokens_ahead
from tx_async.engine.platform import Platform
from tx_async.engine.prefix_cache import PageKeys, PrefixCache
from tx_async.engine.prompt_scores import PromptScoring, Scores
from tx_async.engine.replies import fetch, finished_sequence, piece_of, store_scores
from tx_async.engine.sampler import TOPK_MAX
from tx_async.engine.sequence_times import Times
from tx_async.engine.sequences import Schedule, Sequences, SequenceState, prompt_key
from tx_async.engine.shaping import check_shaping, shapes, shaping_of
from tx_async.engine.state_slots import StateSlots
from tx_async.engine.stops import StopStrings, load_decoder
from tx_async.engine.streams import Stream
from tx_async.errors import Category, InvalidRequest
from tx_async.grammar import Constraint, GrammarError, compiled, vocabulary
from tx_async.layers.lora import LoraWeights
from tx_async.wire.operations import SUPPORT_TOKENS_MAX, is_shaped
from tx_async.wire.worker import (
    BASE_SLOT,
    EngineConfig,
    FinishedSequence,
    Sampled,
    SampleQuantum,
    SequencePiece,
    SequenceSpec,
)
from tx_async.worker.engine_api import Pending, Reply

CACHE_BYTES = 1 << 30
"""The KV cache's size where the device does not say how much memory it has."""
COPY_BYTES_MAX = 4 << 30
"""The largest weights of which a CPU keeps a second copy, laid out for decoding. Its programs hold every layer of such
a model."""


@dataclass
class Quantum:
    """A quantum that was dispatched. `reply` is set when the host's part of it is done."""

    schedule: Schedule
    progress: dict[int, int]
    began_at: float
    """Monotonic seconds: when it was dispatched, once the quantum before it was settled."""
    decoded: tuple[Sequence[SequenceState], Decoded] | None = None
    scored: list[tuple[list[ScoringPiece], tuple[Array, ...]]] = field(default_factory=list)
    reply: Reply | None = None


class SamplingEngine:
    """Owner of the KV cache and of every sequence. One thread calls `admit`, `cancel`, `quantum`, in stream order."""

    def __init__(
        self,
        model: Any,
        params: Any,
        config: EngineConfig,
        context: int,
        folder: str,
        lora_weights: LoraWeights,
        lora_scale: Array,
        stream: Stream,
        platform: Platform,
        allocate: Allocate = on_device,
        kernels: Kernels = NO_KERNELS,
    ):
        """context: the most tokens of prompt and completion together; folder: the base model's, for its tokenizer;
        stream: every program of sampling is dispatched on it; kernels: what runs in place of the plain versions."""
        self.model, self.context, self.folder, self.platform = model, context, folder, platform
        self.kernels = kernels
        self.use_params(params)
        self.stream = stream
        self.num_sequences_max = config.sample_max_num_sequences
        self.decode_steps = config.decode_steps or platform.decode_steps
        self.prefill_tokens = config.prefill_chunk_tokens or platform.prefill_tokens
        dtype = jax.tree.leaves(params)[0].dtype
        paging, ahead = Paging.of(model.window_layers), tokens_ahead(config, platform)
        tokens = config.kv_cache_tokens or min(
            paging.cache_for(config.sample_max_num_sequences, context, ahead),
            _cache_bytes() // token_bytes(model, dtype),
        )
        self.layout = CacheLayout.plan(tokens, config.kv_page_size, context, platform, paging, ahead)
        num_states, num_snapshots = state_slots(model, dtype, config, _cache_bytes())
        self.layout = replace(self.layout, num_slots=1 + num_states + num_snapshots if num_states else 0)
        self.tile_tokens = _tile_tokens(model, self.layout, platform)
        self.prefill_rows = _prefill_rows(model, platform)
        mesh = model.mesh
        #: the sharding of results: every device has them whole; None without a mesh
        self._replicated = NamedSharding(mesh, PartitionSpec()) if mesh else None
        self._pool_shardings = pool_shardings(model, mesh) if mesh else None
        #: page pools on the device; replaced by every dispatch
        self.pools: Pools = self.layout.new_pools(model, dtype, self._pool_shardings, allocate)
        self._copies_max = self.num_sequences_max * paging.num_tables
        self._batch_sizes = batch_sizes(self.num_sequences_max, platform)
        self.sequences = Sequences(
            PrefixCache(self.layout.num_pages, self.layout.page_size, config.prefix_cache),
            num_states or self.num_sequences_max,
            self._batch_sizes[-1],
            StateSlots(num_states, num_snapshots),
            paging.windows,
        )
        self._num_admitted = 0
        #: the newest quantum: all before it are settled
        self._last: Quantum | None = None
        #: (sequence_id, category, message) for the next quantum that is settled
        self._failed: list[tuple[int, Category, str]] = []
        self._lock = threading.RLock()
        self.programs = {program.name: program for program in self._list_programs(lora_weights, lora_scale)}

    def __repr__(self) -> str:
        return f"<SamplingEngine {self.sequences!r}>"

    @property
    def kv_cache_tokens(self) -> int:
        return self.layout.cache_tokens

    def use_params(self, params: Any) -> None:
        self.params = params
        #: the same weights, laid out in another way where steps of few tokens want that
        self.decode_params = self._for_decoding(params)

    def _for_decoding(self, params: Any) -> Any:
        if not self.platform.copies_weights or self.model.mesh is not None:
            return params
        fits = sum(array.nbytes for array in jax.tree.leaves(params)) <= COPY_BYTES_MAX
        return self.model.for_decoding(params) if fits else params

    # ---- commands

    def admit(self, specs: Sequence[SequenceSpec], tensors: Sequence[np.ndarray], loaded: Sequence[bool]) -> None:
        """Queue sequences; `tensors` are read only during this call. Sequences of a sampler slot that is not `loaded`
        fail alone, and so do those whose grammar cannot be used. Raises `InvalidRequest` before it has queued any."""
        samples: list[SequenceState] = []
        failed: list[tuple[int, Category, str]] = []
        for spec in specs:
            try:
                if spec.sampler_slot != BASE_SLOT and not loaded[spec.sampler_slot]:
                    failed.append((spec.sequence_id, "server", f"Sampler slot {spec.sampler_slot} is empty."))
                else:
                    samples.append(self._sample(spec, tensors))
            except GrammarError as error:
                failed.append((spec.sequence_id, "user", f"grammar: {error.message}"))
        with self._lock:
            self._failed += failed
            for sample in samples:
                self.sequences.admit(sample)

    def cancel(self, sequence_ids: Iterable[int]) -> None:
        with self._lock:
            self._settle_last()
            self.sequences.cancel(sequence_ids)

    def quantum(self, command: SampleQuantum, lora_weights: LoraWeights, lora_scale: Array) -> Pending:
        """Dispatch one quantum."""
        steps = min(command.decode_steps or self.decode_steps, self.decode_steps)
        prefill_tokens = max(command.prefill_tokens, self.layout.page_size)
        with self._lock:
            self._settle_last()
            schedule = self.sequences.schedule(steps, prefill_tokens, command.only_first_tokens)
            quantum = Quantum(schedule, _prefill_progress(schedule), time.monotonic())
            self.stream.run(self._dispatch, quantum, steps, lora_weights, lora_scale)
            self._last = quantum
        return partial(self._wait, quantum)

    def _sample(self, spec: SequenceSpec, tensors: Sequence[np.ndarray]) -> SequenceState:
        prompt = tensors[spec.prompt_index]
        if not 1 <= len(prompt) <= self.context - (spec.prompt_scores is None):
            raise InvalidRequest(f"A prompt of {len(prompt)} tokens does not fit a context of {self.context}.")
        check_shaping(spec)
        tokens = prompt.tolist()
        self._num_admitted += 1
        return SequenceState(
            order=self._num_admitted,
            spec=spec,
            prompt_key=prompt_key(spec, prompt),
            num_prompt=len(tokens),
            limit=min(len(tokens) + max(1, spec.max_tokens), self.context),
            tokens=tokens,
            keys=PageKeys(spec.adapter_version, self.layout.page_size),
            stops=StopStrings(spec.stop_strings, load_decoder(self.folder), tokens) if spec.stop_strings else None,
            constraint=self._constraint(spec),
            scoring=_scoring(spec, tensors, len(tokens)),
            times=Times(admitted_at=time.monotonic()),
        )

    def _constraint(self, spec: SequenceSpec) -> Constraint | None:
        if not spec.grammar:
            return None
        return compiled(vocabulary(self.folder), spec.grammar).begin(spec.stop_token_ids, self.model.vocab_size)

    # ---- dispatch

    def _dispatch(self, quantum: Quantum, steps: int, lora_weights: LoraWeights, lora_scale: Array) -> None:
        self._prefill(quantum, lora_weights, lora_scale)
        self._copy("copy pages", quantum.schedule.copies)
        self._copy("copy states", quantum.schedule.state_copies)
        self._decode(quantum, steps, lora_weights, lora_scale)

    def _prefill(self, quantum: Quantum, lora_weights: LoraWeights, lora_scale: Array) -> None:
        tile_tokens = self.tile_tokens
        for rows, tiles in prefill_calls(quantum.schedule.prefill, tile_tokens, self.prefill_rows):
            batch = prefill_batch(tiles, rows, tile_tokens, self.layout)
            adapters = Adapters.of(lora_weights, lora_scale, batch.adapter)
            hidden, self.pools = self.programs[f"prefill {rows}"](self.params, adapters, self.pools, batch)
            for pieces, scores in score_batches(tiles, tile_tokens):
                adapters = Adapters.of(lora_weights, lora_scale, scores.adapter)
                quantum.scored.append((pieces, self.programs[f"score {rows}"](self.params, adapters, hidden, scores)))

    def _copy(self, program: str, copies: Sequence[tuple[int, int]]) -> None:
        if not copies:
            return
        pairs = np.zeros((2, self._copies_max), np.int32)
        pairs[:, : len(copies)] = np.array(copies, np.int32).T
        self.pools = self.programs[program](self.pools, pairs[0], pairs[1])

    def _decode(self, quantum: Quantum, steps: int, lora_weights: LoraWeights, lora_scale: Array) -> None:
        if not quantum.schedule.decoding:
            return
        # The rows of an adapter stand together.
        samples = sorted(quantum.schedule.decoding, key=lambda sample: sample.spec.sampler_slot)
        rows = bucket(self._batch_sizes, len(samples))
        batch = decode_batch(samples, rows, self.layout)
        adapters = Adapters.of(lora_weights, lora_scale, batch.adapter)
        if self.platform.grouped_lora and not adapters.num_active:
            adapters = adapters.without_lora
        num_candidates = heads.num_candidates(max(sample.spec.head_tokens for sample in samples))
        name = _decode_program(rows, bool(adapters.weights), num_candidates)
        arguments = [self.decode_params, adapters, self.pools, batch, np.int32(steps)]
        constrained = any(sample.constraint for sample in samples)
        if constrained or any(is_shaped(sample.spec) for sample in samples):
            name = f"{'constrained' if constrained else 'shaped'} {name}"
            arguments.append(shaping_of(samples, rows, self.context, self.model.vocab_size))
        decoded, self.pools = self.programs[name](*arguments)
        quantum.decoded = (samples, decoded)

    # ---- the host's part, once the tokens are there

    def _wait(self, quantum: Quantum) -> Reply:
        if quantum.reply is None:
            jax.block_until_ready(quantum.decoded)  # before the lock: `admit` must not wait for the device
        with self._lock:
            if quantum.reply is None:
                self._settle(quantum)
            assert quantum.reply is not None
            return quantum.reply

    def _settle_last(self) -> None:
        if self._last is not None and self._last.reply is None:
            self._settle(self._last)

    def _settle(self, quantum: Quantum) -> None:
        for scored, arrays in quantum.scored:
            store_scores(scored, Scores(*(np.asarray(array) for array in arrays)))
        finished: list[FinishedSequence] = []
        pieces: list[SequencePiece] = []
        tensors: list[np.ndarray] = []
        if quantum.decoded:
            samples, decoded = quantum.decoded
            out = fetch(decoded, samples)
            now = time.monotonic()
            for row, sample in enumerate(samples):
                sample.times.decoded(quantum.began_at, now)
                count, reason = self._extend(sample, row, out, quantum.progress)
                if reason:
                    finished.append(finished_sequence(sample, reason, tensors, now))
                    self.sequences.finish(sample)
                elif problem := obey(sample, count):
                    self._failed.append((sample.spec.sequence_id, "user", problem))
                    self.sequences.finish(sample)
                elif count and sample.spec.stream:
                    pieces.append(piece_of(sample, count, tensors))
        num_decoding = self.sequences.num_decoding
        failed, self._failed = self._failed, []
        quantum.reply = (
            Sampled(
                finished=tuple(finished),
                failed=tuple(failed),
                progress=tuple(quantum.progress.items()),
                num_running=num_decoding,
                num_waiting=len(self.sequences.running) - num_decoding + len(self.sequences.waiting),
                num_prefilled_tokens=sum(segment.stop - segment.start for segment in quantum.schedule.prefill),
                num_preempted=quantum.schedule.num_preempted,
                pieces=tuple(pieces),
                num_kv_tokens=self.layout.tokens_in(self.sequences.cache.num_used),
            ),
            tensors,
        )

    def _extend(
        self, sample: SequenceState, row: int, out: Decoded, progress: dict[int, int]
    ) -> tuple[int, str | None]:
        """Take a row's new tokens; -> (how many, why the sequence ends with them, if it does)."""
        count = int(out.count[row])
        tokens = out.tokens[:count, row].tolist()
        count, reason = ending(sample, tokens)
        sample.tokens.extend(tokens[:count])
        sample.num_computed = len(sample.tokens) - 1
        sample.logprobs.extend(out.logprobs[:count, row].tolist())
        if k := sample.spec.topk_logprobs:
            sample.topk.append(
                (np.array(out.topk_token_ids[:count, row, :k]), np.array(out.topk_logprobs[:count, row, :k]))
            )
        if k := sample.spec.head_tokens:
            sample.heads.append(heads.head_of_steps(out, slice(0, count), row, k))
        progress[sample.spec.sequence_id] = progress.get(sample.spec.sequence_id, 0) + count
        return count, reason

    # ---- programs

    def _list_programs(self, lora_weights: LoraWeights, lora_scale: Array) -> Iterator[Program]:
        """Every program of the sampling half: no input ever needs another one."""
        program = partial(Program, options=row_independent() if self.platform.same_sums_in_every_batch else None)
        adapters = partial(Adapters.of, lora_weights, lora_scale)
        and_pools = (self._replicated, self._pool_shardings) if self._replicated else None

        decode = partial(programs.decode, self.platform, self.model, self.layout, self.decode_steps)
        decode = partial(decode, kernels=self.kernels)
        for num, rows in product((TOPK_MAX, SUPPORT_TOKENS_MAX), self._batch_sizes):
            function = partial(decode, num_candidates=num)
            batch = decode_batch([], rows, self.layout)
            arguments = (self.decode_params, adapters(batch.adapter), self.pools, batch, np.int32(0))
            shaping = shapes(rows, self.context), shapes(rows, self.context, self.model.vocab_size)
            variants = {True: arguments}
            if self.platform.grouped_lora:
                variants[False] = (arguments[0], arguments[1].without_lora, *arguments[2:])
            for with_lora, variant in variants.items():
                name, more = _decode_program(rows, with_lora, num), {"donate": (2,), "out_shardings": and_pools}
                yield program(name, function, variant, **more)
                yield program(f"shaped {name}", function, (*variant, shaping[0]), **more)
                yield program(f"constrained {name}", function, (*variant, shaping[1]), **more)

        function, tile_tokens = partial(programs.prefill, self.platform, self.model, self.layout), self.tile_tokens
        function = partial(function, kernels=self.kernels)
        for rows in self.prefill_rows:
            batch = prefill_batch([], rows, tile_tokens, self.layout)
            arguments = (self.params, adapters(batch.adapter), self.pools, batch)
            yield program(f"prefill {rows}", function, arguments, donate=(2,), out_shardings=and_pools)

        for rows in self.prefill_rows:
            shape, scores = (rows * tile_tokens, self.model.hidden_size), empty_scores()
            hidden = jax.ShapeDtypeStruct(shape, self.params["embed"].dtype, sharding=self._replicated)
            arguments = (self.params, adapters(scores.adapter), hidden, scores)
            function = partial(programs.score, self.platform, self.model.mesh)
            yield program(f"score {rows}", function, arguments, out_shardings=self._replicated)

        pages = np.zeros(self._copies_max, np.int32)
        kinds = {"copy pages": (self.layout.num_pages, tuple(self.model.cache_shapes))}
        if self.model.state_layers:
            kinds["copy states"] = (self.layout.num_slots, tuple(self.model.state_shapes))
        for name, (count, pools) in kinds.items():
            function = partial(copy_pages, num_pages=count, names=pools)
            arguments = (self.pools, pages, pages)
            yield program(name, function, arguments, donate=(0,), out_shardings=self._pool_shardings)


def _tile_tokens(model: Any, layout: CacheLayout, platform: Platform) -> int:
    """Tokens of a prefill tile, in whole pages."""
    pages = 1 if model.state_layers else max(1, platform.prefill_tile_tokens // layout.page_size)
    return pages * layout.page_size


def _prefill_rows(model: Any, platform: Platform) -> tuple[int, ...]:
    """The sizes of prefill calls: one alone with recurrent layers where sums must be the same in every batch. XLA fuses
    their rule with what is around it, for each number of rows in another way, which rounds in another way (1e-6)."""
    is_one = model.state_layers and platform.same_sums_in_every_batch
    return platform.prefill_rows[:1] if is_one else platform.prefill_rows


def _cache_bytes() -> int:
    """A share of the device's whole memory, not of what is free: every process of a mesh must compute the same
    number."""
    memory = jax.local_devices()[0].memory_stats() or {}
    return memory.get("bytes_limit", 0) // CACHE_PART or CACHE_BYTES


def _scoring(spec: SequenceSpec, tensors: Sequence[np.ndarray], num_prompt: int) -> PromptScoring | None:
    wanted = spec.prompt_scores
    if wanted is None:
        return None
    return PromptScoring(
        wanted, num_prompt, np.array(tensors[wanted.targets_index]) if wanted.targets_index >= 0 else None
    )


def _prefill_progress(schedule: Schedule) -> dict[int, int]:
    progress: dict[int, int] = {}
    for segment in schedule.prefill:
        sequence_id = segment.sample.spec.sequence_id
        progress[sequence_id] = progress.get(sequence_id, 0) + segment.stop - segment.start
    return progress


def _decode_program(rows: int, with_lora: bool, num_candidates: int) -> str:
    return f"decode {rows}{'' if with_lora else ' base'}{'' if num_candidates == TOPK_MAX else ' wide'}"
