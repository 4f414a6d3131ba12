"""Workers and servers die; runs go on as if nothing had happened."""

import msgspec
import pytest

from tests.support.chain_engine import NAN_TOKEN
from tests.support.reference import Reference
from tests.support.stage import Stage
from tx_async.wire.operations import CreateModelFromCheckpoint


def uninterrupted(steps: int, half_step: bool = False):
    stage = Stage()
    model = stage.model()
    stage.train(model, steps)
    if half_step:
        stage.forward_backward(model, 2 * steps + 1)
    stage.run()
    return stage.adapter(model)


def test_a_worker_dies_with_gradients_half_accumulated(stage: Stage):
    """Two steps are done and a forward_backward is in the accumulator when the worker is killed. The next worker starts
    from nothing, and what comes after is what would have come."""
    model = stage.model()
    stage.train(model, 2)
    stage.forward_backward(model, 5)
    stage.run()
    stage.crash_worker()
    stage.start_worker()
    later = stage.optim_step(model, 6)
    stage.run()
    assert not stage.error(later)
    clean = Stage()
    other = clean.model()
    clean.train(other, 2)
    clean.forward_backward(other, 5)
    clean.optim_step(other, 6)
    clean.run()
    assert stage.adapter(model) == clean.adapter(other)


@pytest.mark.parametrize("kill_after", range(0, 14, 2))
def test_the_server_dies_after_any_number_of_commands(stage: Stage, kill_after: int):
    model = stage.model()
    stage.train(model, 5)
    for _ in range(kill_after):
        stage.settle()
        assert stage.worker
        if stage.worker.outbox:
            stage._deliver()
        elif stage.worker.inbox:
            stage.execute_next()
    stage.crash_server()
    stage.start_worker()
    stage.run()
    assert stage.adapter(model) == uninterrupted(5)
    Reference(stage).check()


def test_results_that_were_not_fetched_are_still_there(stage: Stage):
    model = stage.model()
    requests = stage.train(model, 1)
    stage.run()
    before = [stage.result(request) for request in requests]
    stage.crash_server()
    assert [stage.result(request) for request in requests] == before


def test_a_snapshot_frees_bodies_and_shortens_the_replay(stage: Stage):
    """Snapshots come every three steps here. Bodies are kept from the older of the two newest on."""
    model = stage.model()
    requests = stage.train(model, 7)
    stage.run()
    newest, older = stage.catalog.models[model].snapshots
    assert (newest.seq_id, older.seq_id) == (12, 6)
    bodies = [request for request in requests if request in stage.disk.bodies]
    assert bodies == requests[6:]
    assert len(stage.lane(model).steps) == 14 - 6
    stage.crash_worker()
    stage.executed.clear()
    stage.start_worker()
    stage.optim_step(model, 15)
    stage.run()
    assert [type(command).__name__ for command in stage.executed] == [
        "LoadAdapter",
        "TrainMicroBatch",
        "StepOptimizer",
        "StepOptimizer",
    ]


def test_a_snapshot_does_not_count_before_all_that_it_contains_has_ended(stage: Stage):
    """Its files may be durable while a forward_backward in it is unanswered: if that is lost, it must run again, and so
    it must not be in the base."""
    model = stage.model()
    stage.train(model, 3)
    worker = stage.worker
    assert worker
    while worker.inbox or worker.outbox:
        if worker.inbox:
            stage.execute_next()
        elif len(worker.outbox) > 1:
            stage._deliver()
            stage.settle()
        else:
            break
    while worker.saving:
        stage.finish_a_save()
    stage.settle()
    assert stage.catalog.models[model].snapshots == () or not worker.outbox
    stage.run()
    stage.settle()
    assert len(stage.catalog.models[model].snapshots) == 1


def test_a_damaged_snapshot_costs_a_longer_replay_and_nothing_else(stage: Stage):
    model = stage.model()
    stage.train(model, 8)
    stage.run()
    newest, _ = stage.catalog.models[model].snapshots
    stage.storage.damaged.add(newest.key)
    stage.crash_server()
    stage.start_worker()
    stage.forward_backward(model, 17)
    stage.run()
    assert stage.adapter(model) == _with_one_more(8)
    assert newest not in stage.catalog.models[model].snapshots
    assert newest.key not in stage.storage.files, "nobody will ever ask for it"


def _with_one_more(steps: int):
    stage = Stage()
    model = stage.model()
    stage.train(model, steps)
    stage.forward_backward(model, 2 * steps + 1)
    stage.run()
    return stage.adapter(model)


def test_the_only_snapshot_is_damaged_and_the_run_repeats_itself_from_its_creation(stage: Stage):
    model = stage.model()
    stage.train(model, 4)
    stage.run()
    (only,) = stage.catalog.models[model].snapshots
    stage.storage.damaged.add(only.key)
    stage.crash_server()
    stage.start_worker()
    stage.forward_backward(model, 9)
    stage.run()
    assert stage.adapter(model) == _with_one_more(4)


def test_nothing_good_is_left_and_the_run_says_so(stage: Stage):
    model, other = stage.model(), stage.model()
    stage.train(model, 8)
    stage.train(other, 1)
    stage.run()
    for snapshot in stage.catalog.models[model].snapshots:
        stage.storage.damaged.add(snapshot.key)
    stage.crash_server()
    stage.start_worker()
    lost = stage.forward_backward(model, 17)
    fine = stage.forward_backward(other, 3)
    stage.run()
    assert "none of its snapshots can be read" in stage.error(lost)
    assert stage.catalog.models[model].status == "corrupted"
    assert "corrupted" in stage.error(stage.forward_backward(model, 18))
    assert not stage.error(fine)


def test_a_body_that_a_replay_needs_is_gone(stage: Stage):
    model = stage.model()
    done = stage.forward_backward(model, 1)
    stage.run()
    del stage.disk.bodies[done]
    stage.crash_worker()
    stage.start_worker()
    later = stage.optim_step(model, 2)
    stage.run()
    assert stage.catalog.models[model].status == "corrupted" and "has lost the content" in stage.error(later)


def test_storage_that_is_out_of_reach_delays_and_damages_nothing(stage: Stage):
    """An object store has an outage of some minutes while a worker restarts."""
    model = stage.model()
    stage.train(model, 7)
    stage.run()
    snapshots = stage.catalog.models[model].snapshots
    stage.crash_worker()
    stage.storage.is_down = True
    stage.start_worker()
    later = stage.forward_backward(model, 15)
    for _ in range(5):
        stage.run()
        stage.wait(60)
    assert stage.result(later) is None and stage.catalog.models[model].snapshots == snapshots
    stage.storage.is_down = False
    stage.wait(60)
    stage.run()
    assert not stage.error(later) and stage.adapter(model) == _with_one_more(7)


def test_a_step_that_met_nan_gradients_is_replayed_as_such(stage: Stage):
    """The step failed and cleared the gradients; a replay that left it out would keep them."""
    model = stage.model()
    stage.forward_backward(model, 1, token=NAN_TOKEN)
    bad = stage.optim_step(model, 2)
    stage.forward_backward(model, 3)
    stage.run()
    stage.crash_worker()
    stage.start_worker()
    good = stage.optim_step(model, 4)
    stage.run()
    assert "NaN" in stage.error(bad) and not stage.error(good)
    Reference(stage).check()


def test_what_failed_without_effect_is_left_out_of_a_replay(stage: Stage):
    model = stage.model()
    failed = stage.forward_backward(model, 1)
    stage.execute_next()  # creates the adapter
    stage.fail_next("user", "it did not work out")
    stage.run()
    assert "did not work out" in stage.error(failed)
    stage.crash_server()
    stage.start_worker()
    later = stage.optim_step(model, 2)
    stage.run()
    assert not stage.error(later)
    Reference(stage).check()


def test_a_model_from_a_checkpoint_survives_a_crash_before_it_was_first_loaded(stage: Stage):
    source = stage.model()
    stage.train(source, 1)
    stage.save(source, 3, "a")
    stage.run()
    stage.models.append("s:train:1")
    operation = CreateModelFromCheckpoint(
        model_id="s:train:1", session_id="s", model_seq_id=1, path=f"tinker://{source}/weights/a", optimizer=True
    )
    request = stage.submit_now(operation)
    stage.crash_server()
    stage.start_worker()
    stage.run()
    assert not stage.error(request)
    step = stage.optim_step("s:train:1", 1)
    stage.run()
    assert not stage.error(step)
    Reference(stage).check()


def test_a_restart_with_a_smaller_maximum_rank_refuses_and_destroys_nothing(stage: Stage):
    model = stage.model(rank=8)
    stage.train(model, 7)
    stage.run()
    before = stage.catalog.models[model].snapshots
    stage.crash_server()
    stage.info = msgspec.structs.replace(stage.info, max_lora_rank=4)
    stage.start_worker()
    refused = stage.forward_backward(model, 15)
    stage.run()
    assert "max_lora_rank" in stage.error(refused)
    assert stage.catalog.models[model].snapshots == before and stage.catalog.models[model].status == "live"


def test_lane_says_where_it_is(stage: Stage):
    model = stage.model()
    stage.train(model, 1)
    stage.run()
    assert repr(stage.lane(model)) == f"<Lane {model} [cursor 3 | 0 waiting]>" and stage.is_resident(model)
