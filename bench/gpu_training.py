"""Training micro-batches of one and of eight tenants, and an optimizer step, on an engine that a `Driver` drives."""

from __future__ import annotations

import itertools
import time

import numpy as np
from gpu_card import Card
from gpu_driver import Driver, Work, for_seconds, rates
from gpu_engine import RANK, Model
from gpu_table import Result, Skipped

from tx_async.engine.adapter_slots import slot_bytes
from tx_async.scheduler.training.packing import PackedRow, Segment, fill
from tx_async.wire.operations import Datum, ForwardBackward
from tx_async.wire.tensors import Tensor
from tx_async.wire.worker import AdamParams, AdapterConfig, CreateAdapter, StepOptimizer, TrainMicroBatch

TENANTS = 8
SEGMENTS = (6, 4, 3, 2, 1)
"""How the sequences of a packed row share it, in sixteenths."""
STEPS = 20
STEPS_IN_FLIGHT = 2


def create_adapters(driver: Driver) -> None:
    for slot in range(min(TENANTS, driver.info.num_training_slots)):
        driver.do(CreateAdapter(slot=slot, config=AdapterConfig(rank=RANK, seed=slot)))


def micro_batches(driver: Driver, rows: int, length: int, tenants: int) -> Work:
    """Full rows, packed as the scheduler packs them; the tenants take turns row by row."""
    if (rows, length) not in driver.info.row_shapes:
        raise Skipped(f"the engine offers {', '.join(f'{r}x{n}' for r, n in driver.info.row_shapes)}")
    if tenants > driver.info.num_training_slots:
        raise Skipped(f"the memory has room for {driver.info.num_training_slots} training slots")
    rng, places = np.random.default_rng(0), _places(length)
    contents = []
    for _ in range(rows):
        data = tuple(_datum(rng, place.length, driver.info.vocab_size) for place in places)
        operation = ForwardBackward(model_id="m", seq_id=0, data=data, loss_fn="cross_entropy")
        contents.append((operation, PackedRow(length, places)))
    tensors, tenant = fill(contents, length, 1), itertools.cycle(range(tenants))

    def work() -> tuple[TrainMicroBatch, list[np.ndarray]]:
        slots = tuple(next(tenant) for _ in range(rows))
        return TrainMicroBatch(slots=slots, row_length=length, targets_per_token=1, forward_only=False), tensors

    return work


def _places(length: int) -> tuple[Segment, ...]:
    lengths = [length * part // sum(SEGMENTS) for part in SEGMENTS]
    ends = itertools.accumulate(lengths)
    return tuple(Segment(i, end - own, own) for i, (end, own) in enumerate(zip(ends, lengths, strict=True)))


def _datum(rng: np.random.Generator, length: int, vocab_size: int) -> Datum:
    tokens, targets = rng.integers(0, vocab_size, (2, length))
    return Datum(tokens.astype(np.int32).tobytes(), {"target_tokens": Tensor.of(targets.astype(np.int64))})


def train(model: Model, driver: Driver, card: Card, rows: int, length: int, tenants: int, seconds: float) -> Result:
    work = micro_batches(driver, rows, length, tenants)
    rate = rates(driver.run({"train": work}, for_seconds(seconds, ["train"])), ["train"])["train"]
    again = driver.engine.recompute(rows, length)
    layers = model.decoder.num_layers - again.keeping if again.layers else 0
    note = f"{1e3 * rows * length / rate:.1f} ms each; {layers} of {model.decoder.num_layers} layers computed again"
    return Result(rate, "tokens/s", *card.of_flops(4 * model.num_params * rate), note)


def optim_step(driver: Driver, card: Card) -> Result:
    command = StepOptimizer(slot=0, adam=AdamParams(learning_rate=1e-6))
    driver.do(command)
    pending = [driver.engine.execute(command, []) for _ in range(STEPS_IN_FLIGHT)]
    began = time.perf_counter()
    for _ in range(STEPS):
        pending.pop(0)()
        pending.append(driver.engine.execute(command, []))
    seconds = (time.perf_counter() - began) / STEPS
    for wait in pending:
        wait()
    moved = 2 * slot_bytes(driver.engine.targets, RANK)  # A, B, m, v and gradients, read and written
    return Result(1e3 * seconds, "ms", *card.of_bytes(moved / seconds), f"{moved / 2**20:,.0f} MiB read and written")
