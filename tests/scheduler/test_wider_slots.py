"""An adapter of a rank that no slot holds: the worker starts again with wider ones, and nobody loses anything by it."""

import msgspec
import pytest

from tests.support.reference import Reference
from tests.support.simulated_worker import WORKER
from tests.support.simulation import INFO
from tests.support.stage import Stage
from tx_async.scheduler.core.state import LEAVING_S
from tx_async.wire.worker import CreateAdapter, TrainMicroBatch

NARROW = msgspec.structs.replace(INFO, max_lora_rank=4, lora_rank_limit=8, lora_rank_classes=(4, 8))


@pytest.fixture
def stage() -> Stage:
    return Stage(info=NARROW)


def test_a_run_of_a_higher_rank_waits_until_the_worker_has_started_again(stage: Stage):
    """What others have trained is in snapshots by then: nothing is computed twice, and no attempt is spent."""
    narrow = stage.model(rank=4)
    stage.train(narrow, 2)
    stage.run()
    wide = stage.model(rank=8)
    steps = [*stage.train(wide, 1), *stage.train(narrow, 1, first_seq_id=5)]
    stage.run()
    assert stage.num_widenings == 1 and stage.worker is None
    assert stage.info.max_lora_rank == 8
    num_trained = sum(isinstance(command, TrainMicroBatch) for command in stage.executed)
    stage.start_worker()
    stage.run()
    assert not any(map(stage.error, steps))
    assert sum(isinstance(command, TrainMicroBatch) for command in stage.executed) == num_trained + 2
    assert not any(step.num_failures for step in stage.lane(narrow).steps.values())
    Reference(stage).check()


def test_samples_that_are_cut_off_by_the_start_run_again_and_spend_no_attempt(stage: Stage):
    wide = stage.model(rank=8)
    sample = stage.ask(stage.sampler(), num_samples=2, max_tokens=15)
    stage.step()
    stage.train(wide, 1)
    while stage.worker is not None:
        assert stage.step()
    (job,) = stage.state.sampling.jobs.values()
    assert job.num_failures == 0 and len(job.pending) == 2
    stage.start_worker()
    stage.run()
    assert not stage.error(sample)
    Reference(stage).check()


def test_a_checkpoint_of_a_higher_rank_is_sampled_after_the_start(stage: Stage):
    """Only its files tell the rank: the worker says it when it reads them."""
    stage.info = msgspec.structs.replace(NARROW, max_lora_rank=8)
    stage.crash_worker()
    stage.start_worker()
    wide = stage.model(rank=8)
    stage.train(wide, 1)
    saved = stage.save(wide, 3, "there", kind="sampler_weights")
    stage.run()
    stage.info = NARROW
    stage.crash_worker()
    stage.start_worker()
    sample = stage.ask(stage.sampler(path=f"tinker://{wide}/sampler_weights/there"))
    stage.run()
    assert stage.num_widenings == 1
    stage.start_worker()
    stage.run()
    assert not stage.error(saved) and not stage.error(sample)
    Reference(stage).check()


def test_storage_that_takes_no_snapshot_delays_the_start_for_a_minute_only(stage: Stage):
    narrow, wide = stage.model(rank=4), stage.model(rank=8)
    stage.train(narrow, 1)
    stage.run()
    stage.forward_backward(wide, 1)
    stage.run_until_next(lambda sent: sent.cause != "" and type(sent.command).__name__ == "SaveAdapter")
    stage.settle()
    assert stage.num_widenings == 0
    stage.wait(LEAVING_S)
    assert stage.num_widenings == 1
    stage.start_worker()
    stage.run()
    assert stage.is_resident(wide)
    Reference(stage).check()


def test_a_rank_beyond_every_slot_is_refused_and_names_the_setting(stage: Stage):
    refused = stage.forward_backward(stage.model(rank=9), 1)
    stage.run()
    assert "hold at most 8 (`max_lora_rank`" in stage.error(refused)
    assert stage.num_widenings == 0 and not any(isinstance(command, CreateAdapter) for command in stage.executed)


def test_only_adapters_of_one_class_share_a_micro_batch():
    stage = Stage(info=msgspec.structs.replace(NARROW, max_lora_rank=8, row_shapes=((4, 4),), num_training_slots=3))
    models = [stage.model(rank=rank) for rank in (3, 8, 4)]
    requests = [stage.forward_backward(model, 1) for model in models]
    stage.run()
    batches = [command for command in stage.executed if isinstance(command, TrainMicroBatch)]
    slot_of = stage.state.workers[WORKER].training_slots.slot_of
    together = {slot_of(models[0]), slot_of(models[2])}
    assert not any(map(stage.error, requests))
    for batch in batches:
        slots = {slot for slot in batch.slots if slot >= 0}
        assert slots <= together or slots == {slot_of(models[1])}
