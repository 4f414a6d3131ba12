"""An example of an engine of one's own: it samples, knows no JAX, and is deterministic.

    tx-async worker --connect tcp://server:7001 --name example --capabilities sample \\
        --engine tests.support.peft_sampler:create

It attaches beside the worker that trains, reads each adapter version from storage as the PEFT files that were saved,
and answers a prompt with a walk through the vocabulary whose stride is a checksum of those files: enough to see which
version was asked, and that its bytes arrived. A real one would load the files into its own inference engine here.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tx_async.errors import EngineError
from tx_async.storage.checkpoint_files import read_checkpoint_sync
from tx_async.storage.store import Store
from tx_async.wire import worker as wire
from tx_async.worker.engine_api import Pending, Reply, ReportProgress

LOGPROB = -1.0


def create(welcome: wire.Welcome, progress: ReportProgress) -> PeftSampler:
    return PeftSampler(welcome)


def stride_of(adapter: bytes) -> int:
    """Odd, so that a walk meets every token of a vocabulary whose size is a power of two."""
    return 2 * (zlib.crc32(adapter) % 1000) + 1


class PeftSampler:
    """Implements `worker.engine_api.Engine` for sampling alone; a whole sample takes one quantum."""

    def __init__(self, welcome: wire.Welcome):
        config = json.loads((Path(welcome.base_model) / "config.json").read_text())
        self.config = welcome.engine
        self.vocab_size, self.context = config["vocab_size"], config["max_position_embeddings"]
        self.store = Store(welcome.checkpoints_base)
        #: sampler slot -> stride of the version in it; the base model's is 1
        self.strides = {wire.BASE_SLOT: 1}
        #: admitted sequences and their last prompt token, in order
        self.waiting: dict[int, tuple[wire.SequenceSpec, int]] = {}

    def info(self) -> wire.EngineInfo:
        return wire.EngineInfo(
            vocab_size=self.vocab_size,
            max_context_length=min(self.context, self.config.max_context_length or self.context),
            row_shapes=(),
            row_length_preferred=0,
            target_tokens_k=(1,),
            num_training_slots=0,
            num_sampler_slots=self.config.max_sampler_adapters,
            max_lora_rank=self.config.max_lora_rank,
            num_sequences_max=self.config.sample_max_num_sequences,
            decode_steps=self.context,
            prefill_tokens=self.context,
        )

    def vitals(self) -> wire.Heartbeat:
        return wire.Heartbeat()

    def close(self) -> None:
        self.waiting.clear()

    def execute(self, command: wire.Command, tensors: Sequence[np.ndarray]) -> Pending:
        match command:
            case wire.LoadSampler(sampler_slot=slot, key=key):
                _, files = read_checkpoint_sync(self.store, key)
                assert "adapter_config.json" in files
                self.strides[slot] = stride_of(files["adapter_model.safetensors"])
                return lambda: (wire.Loaded(step=0), [])
            case wire.AdmitSequences(sequences=specs):
                self.waiting |= {spec.sequence_id: (spec, int(tensors[spec.prompt_index][-1])) for spec in specs}
            case wire.CancelSequences(sequence_ids=ids):
                self.waiting = {id: one for id, one in self.waiting.items() if id not in ids}
            case wire.SampleQuantum():
                reply = self._sample()
                return lambda: reply
            case _:
                raise EngineError(f"This worker samples only; it was sent {type(command).__name__}.")
        return lambda: (wire.Done(), [])

    def _sample(self) -> Reply:
        finished, tensors = [], []
        for spec, last in self.waiting.values():
            steps = np.arange(1, spec.max_tokens + 1)
            tokens = (last + spec.sample_index + self.strides[spec.sampler_slot] * steps) % self.vocab_size
            at = len(tensors)
            tensors += [tokens.astype(np.int32), np.full(len(tokens), LOGPROB, np.float32)]
            finished.append(
                wire.FinishedSequence(
                    sequence_id=spec.sequence_id, stop_reason="length", tokens_index=at, logprobs_index=at + 1
                )
            )
        progress = tuple((spec.sequence_id, spec.max_tokens) for spec, _ in self.waiting.values())
        self.waiting.clear()
        return wire.Sampled(finished=tuple(finished), progress=progress), tensors
