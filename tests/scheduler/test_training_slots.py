"""Adapters come and go between slots, host memory and storage; nobody's numbers change."""

from collections import Counter

import msgspec

from tests.support.reference import Reference
from tests.support.simulation import INFO, POLICY
from tests.support.stage import Stage
from tx_async.wire.operations import UnloadModel
from tx_async.wire.worker import LoadAdapter, ReleaseAdapter, SaveAdapter, StepOptimizer, TrainMicroBatch


def test_200_models_on_8_slots_all_train_correctly():
    stage = Stage(info=msgspec.structs.replace(INFO, num_training_slots=8), policy=POLICY)
    models = [stage.model() for _ in range(200)]
    for round_ in range(3):
        for model in models:
            stage.forward_backward(model, 2 * round_ + 1, token=1 + round_)
            stage.optim_step(model, 2 * round_ + 2)
        stage.run()
    assert all(stage.lane(model).cursor == 7 for model in models)
    assert sum(stage.is_resident(model) for model in models) == 8
    Reference(stage).check()


def test_a_run_steps_its_optimizer_before_another_takes_its_slot():
    stage = Stage(info=msgspec.structs.replace(INFO, num_training_slots=2))
    models = [stage.model(stage.new_session(f"t{i}")) for i in range(5)]
    for model in models:
        stage.train(model, 4)
    stage.run()
    has_gradients = set()
    for command in stage.executed:
        match command:
            case TrainMicroBatch(slots=slots):
                has_gradients.update(slots)
            case StepOptimizer(slot=slot):
                has_gradients.discard(slot)
            case SaveAdapter(slot=slot):
                assert slot not in has_gradients
    assert Counter(type(command) for command in stage.executed)[StepOptimizer] == 20
    Reference(stage).check()


def test_a_flood_of_optimizer_steps_takes_turns_with_other_runs():
    stage = Stage(policy=msgspec.structs.replace(POLICY, commands_in_flight_max=8))
    flooding, patient = (stage.model(stage.new_session(name)) for name in ("flood", "patient"))
    stage.train(flooding, 1)
    for seq_id in range(3, 150):
        stage.optim_step(flooding, seq_id)
    stage.train(patient, 4)
    stage.run()
    batches = [i for i, command in enumerate(stage.executed) if isinstance(command, TrainMicroBatch)]
    assert len(batches) == 5 and batches[-1] < 60


def test_an_idle_clean_adapter_leaves_without_being_written_again():
    stage = Stage(info=msgspec.structs.replace(INFO, num_training_slots=1))
    first, second = stage.model(), stage.model()
    stage.forward_backward(first, 1, forward_only=True)
    stage.run()
    stage.forward_backward(second, 1)
    stage.run()
    assert not any(isinstance(command, SaveAdapter) for command in stage.executed)


def test_a_run_that_was_just_evicted_comes_back_before_its_snapshot_is_durable():
    """Its content is still in the worker's memory: nobody waits for the disk."""
    stage = Stage(info=msgspec.structs.replace(INFO, num_training_slots=1))
    first, second = stage.model(), stage.model()
    stage.train(first, 1)
    stage.train(second, 1)
    stage.train(first, 1, first_seq_id=3)
    worker = stage.worker
    assert worker
    while worker.inbox or worker.outbox:
        stage.settle()
        stage._deliver() if worker.outbox else stage.execute_next()
    loads = [command for command in stage.executed if isinstance(command, LoadAdapter)]
    assert loads and loads[0].key not in stage.storage.files
    stage.run()
    Reference(stage).check()


def test_the_snapshot_of_an_eviction_fails_and_the_run_repeats_what_it_held(caplog):
    stage = Stage(info=msgspec.structs.replace(INFO, num_training_slots=1))
    first, second = stage.model(), stage.model()
    stage.train(first, 1)
    stage.run()
    stage.storage.is_down = True
    stage.train(second, 1)
    stage.run()
    assert not stage.lane(first).pending_snapshots
    assert (
        stage.state.training.failures == {("snapshot", "storage"): 2} and f"A snapshot of {first} failed" in caplog.text
    )
    stage.storage.is_down = False
    stage.train(first, 1, first_seq_id=3)
    stage.run()
    assert stage.lane(first).cursor == 5
    Reference(stage).check()


def test_a_run_in_the_middle_of_a_request_keeps_its_slot():
    """A snapshot holds whole operations, so a slot is not taken away between the micro-batches of one."""
    stage = Stage(info=msgspec.structs.replace(INFO, num_training_slots=1, row_shapes=((1, 4), (1, 8), (1, 16))))
    first, second = stage.new_session("a"), stage.new_session("b")
    one, other = stage.model(first), stage.model(second)
    stage.forward_backward(one, 1, sizes=(8, 8, 8, 8, 8))
    stage.forward_backward(other, 1)
    stage.run()
    trained = [command for command in stage.executed if isinstance(command, TrainMicroBatch)]
    assert len(trained) == 6
    Reference(stage).check()


def test_within_a_session_runs_on_the_device_go_first_but_not_for_ever():
    """One session trains more runs than there are slots, and all of them always have work."""
    stage = Stage(info=msgspec.structs.replace(INFO, num_training_slots=2))
    models = [stage.model() for _ in range(5)]
    for model in models:
        for seq_id in range(1, 25):
            stage.forward_backward(model, seq_id, sizes=(8,))
    served: Counter[int] = Counter()
    for _ in range(400):
        stage.settle()
        assert stage.worker
        if stage.worker.outbox:
            stage._deliver()
        elif stage.worker.inbox:
            stage.execute_next()
        if sum(len(lane.steps) > 0 and lane.cursor > 1 for lane in map(stage.lane, models)) == len(models):
            break
        served[0] += 1
    assert all(stage.lane(model).cursor > 1 for model in models)
    moves = sum(isinstance(command, LoadAdapter) for command in stage.executed)
    assert moves < len(stage.executed) / 4


def test_an_unloaded_run_gives_its_slot_back(stage: Stage):
    model = stage.model()
    stage.train(model, 1)
    stage.run()
    stage.submit_now(UnloadModel(model_id=model))
    stage.run()
    assert isinstance(stage.executed[-1], ReleaseAdapter)
    assert not stage.state.workers["w0"].training_slots.slots()
