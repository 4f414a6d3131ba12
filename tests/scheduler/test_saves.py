"""Checkpoints, samplers and loads, in the order of the run's operations."""

import msgspec
import pytest

from tests.support.reference import Reference
from tests.support.simulation import INFO, POLICY
from tests.support.stage import Stage
from tx_async.scheduler.core.facts import SamplerJoined
from tx_async.wire.operations import SaveWeights, UnloadModel
from tx_async.wire.records import SamplerRecord
from tx_async.wire.worker import CreateAdapter, LoadAdapter, SaveAdapter, TrainMicroBatch


def path_of(model: str, name: str) -> str:
    return f"tinker://{model}/weights/{name}"


def sampler_of(stage: Stage, number: int) -> SamplerRecord:
    return stage.catalog.samplers[f"s:sample:{number}"]


def test_a_name_that_is_taken_is_refused_unless_it_may_be_replaced(stage: Stage):
    model = stage.model()
    first = stage.save(model, 1, "a")
    refused = stage.save(model, 2, "a")
    stage.optim_step(model, 3)
    replaced = stage.save(model, 4, "a", overwrite=True)
    stage.run()
    assert [bool(stage.error(r)) for r in (first, refused, replaced)] == [False, True, False]
    assert "exists already" in stage.error(refused)
    assert stage.catalog.checkpoints[path_of(model, "a")].storage_key.endswith("~4")
    Reference(stage).check()


def test_files_of_a_replaced_checkpoint_go_when_nothing_needs_them(stage: Stage):
    model = stage.model()
    stage.save(model, 1, "a")
    stage.run()
    (old,) = [key for key in stage.storage.files if "weights/a" in key]
    sampler = stage.sampler(path=path_of(model, "a"))
    stage.save(model, 2, "a", overwrite=True)
    stage.run()
    assert old in stage.storage.files, f"{sampler} samples it"
    assert stage.catalog.references[old] == 1


def test_the_later_save_keeps_the_name_whichever_files_are_durable_first(stage: Stage):
    model = stage.model()
    stage.save(model, 1, "a")
    stage.optim_step(model, 2)
    stage.save(model, 3, "a", overwrite=True)
    stage.settle()
    worker = stage.worker
    assert worker
    while worker.inbox:
        stage.execute_next()
    worker.saving.reverse()
    stage.run()
    assert stage.catalog.checkpoints[path_of(model, "a")].storage_key.endswith("~3")
    Reference(stage).check()


def test_a_load_waits_for_the_save_before_it(stage: Stage):
    """save_state and load_state are sent without waiting in between; the files take their time."""
    model = stage.model()
    stage.train(model, 1)
    stage.save(model, 3, "a")
    stage.train(model, 1, first_seq_id=4)
    load = stage.load(model, 6, path_of(model, "a"))
    stage.run()
    assert not stage.error(load)
    Reference(stage).check()


def test_a_replayed_load_reads_what_it_read_the_first_time(stage: Stage):
    """load_state has read a checkpoint; then its name is saved anew, and then deleted; then the worker dies before any
    snapshot. The replay must not find the other files, nor none."""
    model, other = stage.model(), stage.model()
    stage.train(other, 1)
    stage.save(other, 3, "a")
    stage.run()
    stage.storage.is_down = True  # no snapshot becomes durable
    load = stage.load(model, 1, path_of(other, "a"))
    worker = stage.worker
    assert worker
    worker.engine.kept[stage.catalog.checkpoints[path_of(other, "a")].storage_key] = next(
        adapter for key, adapter in stage.storage.files.items() if key.endswith("/a~3")
    )
    stage.run()
    assert not stage.error(load)
    loaded = stage.adapter(model)
    stage.storage.is_down = False
    stage.train(other, 1, first_seq_id=4)
    stage.save(other, 6, "a", overwrite=True)
    stage.run()
    stage.delete_checkpoint()
    stage.settle()
    assert path_of(other, "a") not in stage.catalog.checkpoints
    stage.crash_worker()
    stage.start_worker()
    shown = stage.forward_backward(model, 2)
    stage.run()
    assert stage.weights_shown(shown) == loaded.visible


def test_files_that_a_load_has_read_go_when_snapshots_have_made_them_superfluous(stage: Stage):
    model, other = stage.model(), stage.model()
    stage.save(other, 1, "a")
    stage.run()
    stage.load(model, 1, path_of(other, "a"))
    stage.run()
    stage.delete_checkpoint()
    stage.settle()
    key = f"{other}/weights/a~1"
    assert key in stage.storage.files
    stage.train(model, 7, first_seq_id=2)
    stage.run()
    assert key not in stage.storage.files


def test_a_load_of_another_shape_fails_and_says_what_differs(stage: Stage):
    model, other = stage.model(rank=4), stage.model(rank=8)
    stage.save(other, 1, "a")
    stage.run()
    load = stage.load(model, 1, path_of(other, "a"))
    later = stage.forward_backward(model, 2)
    stage.run()
    assert "rank 8 there, 4 here" in stage.error(load) and not stage.error(later)


def test_an_ephemeral_sampler_is_a_session_pinned_to_its_weights(stage: Stage):
    model = stage.model()
    stage.train(model, 1)
    stage.save_ephemeral(model, 3, number=0)
    stage.train(model, 1, first_seq_id=4)
    stage.save_ephemeral(model, 6, number=1)
    stage.run()
    first, second = sampler_of(stage, 0), sampler_of(stage, 1)
    assert first.storage_key != second.storage_key
    sample = stage.ask(first.sampler_id)
    stage.run()
    assert not stage.error(sample)
    Reference(stage).check()


def test_the_sdks_second_attempt_at_an_ephemeral_save_is_the_first_one(stage: Stage):
    """It gives each attempt another number, and would wait five minutes for a conflict to end."""
    model = stage.model()
    stage.train(model, 1)
    first = stage.save_ephemeral(model, 3, number=0)
    assert stage.save_ephemeral(model, 3, number=1) == first
    stage.run()
    assert stage.save_ephemeral(model, 3, number=2) == first
    assert list(stage.catalog.samplers) == ["s:sample:0"]


def test_a_number_of_a_sampling_session_cannot_be_used_for_other_weights(stage: Stage):
    model = stage.model()
    stage.save_ephemeral(model, 1, number=0)
    again = stage.save_ephemeral(model, 2, number=0)
    stage.run()
    assert "exists already" in stage.error(again)


def test_an_inflight_save_moves_earlier_sessions_of_its_run_on(stage: Stage):
    """Rollouts go on with the newest weights while the run trains; samples that were asked for before keep theirs."""
    model, other = stage.model(), stage.model()
    stage.save_ephemeral(model, 1, number=0, inflight=True)
    stage.save_ephemeral(other, 1, number=5, inflight=True)
    stage.run()
    first = sampler_of(stage, 0)
    open_sample = stage.ask(first.sampler_id, num_samples=2)
    stage.train(model, 1, first_seq_id=2)
    stage.save_ephemeral(model, 4, number=1, inflight=True)
    worker = stage.worker
    assert worker
    before = sampler_of(stage, 5)
    stage.run()
    assert sampler_of(stage, 0).storage_key == sampler_of(stage, 1).storage_key != first.storage_key
    assert sampler_of(stage, 5) == before
    assert not stage.error(open_sample)
    assert first.storage_key not in stage.storage.files
    Reference(stage).check()


def test_joins_are_not_forgotten_when_a_session_moves_on(stage: Stage):
    model = stage.model()
    stage.save_ephemeral(model, 1, number=0, inflight=True)
    stage.run()
    stage.handle(SamplerJoined(sampler_of(stage, 0).sampler_id))
    stage.save_ephemeral(model, 2, number=1, inflight=True)
    stage.run()
    assert sampler_of(stage, 0).num_clones == 1


@pytest.mark.parametrize("is_worker", [True, False])
def test_a_save_that_was_cut_off_is_made_again(stage: Stage, is_worker: bool):
    model = stage.model()
    stage.train(model, 1)
    save = stage.save(model, 3, "a")
    stage.train(model, 1, first_seq_id=4)
    worker = stage.worker
    assert worker
    while worker.inbox or worker.outbox:
        stage.settle()
        stage._deliver() if worker.outbox else stage.execute_next()
    stage.settle()
    assert stage.result(save) is None
    stage.crash_worker() if is_worker else stage.crash_server()
    stage.start_worker()
    stage.run()
    assert not stage.error(save)
    Reference(stage).check()


def test_a_save_does_not_count_before_the_steps_that_it_contains_are_answered(stage: Stage):
    """Its files are written by another thread, and durable first. The step's answer is lost with the server, and then
    the run is unloaded: no checkpoint may hold a step that its client was told had not run."""
    model = stage.model()
    step = stage.optim_step(model, 1)
    save = stage.save(model, 2, "a")
    worker = stage.worker
    assert worker
    while worker.inbox:
        stage.execute_next()
    stage.finish_a_save()
    stage.settle()
    assert stage.result(save) is None and not stage.catalog.checkpoints
    stage.crash_server()
    stage.submit_now(UnloadModel(model_id=model))
    assert stage.error(step) and stage.error(save)
    assert not stage.catalog.checkpoints


def out(stage: Stage, seconds: int) -> None:
    """Storage is down for so long, while everything that can happen does."""
    stage.storage.is_down = True
    for _ in range(seconds // 10):
        stage.run()
        stage.wait(10)


def back(stage: Stage) -> None:
    stage.storage.is_down = False
    stage.wait(30)
    stage.run()


def test_a_save_outlasts_an_outage_of_minutes_and_its_run_goes_on_meanwhile(stage: Stage):
    """What is written at last is what was asked for, and nothing ran twice for it."""
    model = stage.model()
    stage.train(model, 1)
    stage.storage.is_down = True
    save = stage.save(model, 3, "a")
    later = stage.train(model, 1, first_seq_id=4)
    out(stage, 300)
    assert stage.result(save) is None and not any(map(stage.error, later))
    back(stage)
    assert not stage.error(save)
    assert sum(isinstance(command, TrainMicroBatch) for command in stage.executed) == 2
    assert [command.again for command in stage.executed if isinstance(command, SaveAdapter)][:2] == [False, True]
    Reference(stage).check()


def test_a_save_that_is_not_in_memory_any_more_is_made_again(stage: Stage):
    model = stage.model()
    stage.train(model, 1)
    save = stage.save(model, 3, "a")
    stage.train(model, 1, first_seq_id=4)
    out(stage, 20)
    stage.worker.engine.kept.clear()  # type: ignore[union-attr]
    out(stage, 60)
    back(stage)
    assert not stage.error(save)
    Reference(stage).check()


@pytest.mark.parametrize("is_worker", [True, False])
def test_a_save_that_waits_for_storage_survives_deaths(stage: Stage, is_worker: bool):
    model = stage.model()
    stage.train(model, 1)
    save = stage.save(model, 3, "a")
    stage.train(model, 1, first_seq_id=4)
    out(stage, 60)
    stage.crash_worker() if is_worker else stage.crash_server()
    stage.start_worker()
    out(stage, 60)
    back(stage)
    assert not stage.error(save)
    Reference(stage).check()


def test_a_name_stays_taken_while_its_save_waits(stage: Stage):
    model = stage.model()
    save = stage.save(model, 1, "a")
    again = stage.save(model, 2, "a")
    out(stage, 60)
    assert "exists already" in stage.error(again)
    back(stage)
    assert not stage.error(save)


def test_a_save_fails_with_the_reason_when_storage_is_away_for_too_long(stage: Stage):
    """The limit is a setting, and the name is free again."""
    model = stage.model()
    save = stage.save(model, 1, "a")
    out(stage, 700)
    assert "could not be written" in stage.error(save)
    stage.storage.is_down = False
    again = stage.save(model, 2, "a")
    stage.run()
    assert not stage.error(again)


def test_a_limit_of_none_is_an_answer_at_once():
    stage = Stage(policy=msgspec.structs.replace(POLICY, storage_patience_s=0))
    stage.storage.is_down = True
    save = stage.save(stage.model(), 1, "a")
    stage.run()
    assert "could not be written" in stage.error(save)


def test_a_run_that_is_unloaded_takes_its_waiting_saves_along(stage: Stage):
    model = stage.model()
    save = stage.save(model, 1, "a")
    out(stage, 20)
    stage.submit_now(UnloadModel(model_id=model))
    back(stage)
    assert "unloaded" in stage.error(save) and not stage.catalog.checkpoints


def test_a_load_waits_out_an_outage_of_storage_and_the_run_waits_with_it(stage: Stage):
    model, other = stage.model(), stage.model()
    stage.train(model, 1)
    stage.save(model, 3, "a")
    stage.train(model, 1, first_seq_id=4)
    stage.run()
    stage.worker.engine.kept.clear()  # type: ignore[union-attr]
    stage.storage.is_down = True
    load = stage.load(model, 6, f"tinker://{model}/weights/a")
    later = stage.optim_step(model, 7)
    fine = stage.optim_step(other, 1)
    for _ in range(10):
        stage.run()
        stage.wait(25)
    assert stage.result(load) is None and stage.result(later) is None and not stage.error(fine)
    stage.storage.is_down = False
    stage.wait(30)
    stage.run()
    assert not stage.error(load) and not stage.error(later)
    Reference(stage).check()


def test_a_load_that_storage_does_not_deliver_for_too_long_fails_alone(stage: Stage):
    model = stage.model()
    stage.train(model, 1)
    stage.save(model, 3, "a")
    stage.run()
    stage.worker.engine.kept.clear()  # type: ignore[union-attr]
    stage.storage.is_down = True
    load = stage.load(model, 4, f"tinker://{model}/weights/a")
    later = stage.optim_step(model, 5)
    for _ in range(30):
        stage.run()
        stage.wait(25)
    stage.run()
    assert "could not be read" in stage.error(load) and not stage.error(later)
    Reference(stage).check()


def test_a_save_waits_for_the_answer_of_the_base_that_it_is_made_of(stage: Stage):
    """The newest snapshot is damaged, and a save is already on its way behind it. Saves are answered by another thread:
    what it says of a slot that holds nothing, or something else, may come first. The client must never hear it."""
    model = stage.model()
    stage.train(model, 6)
    stage.run()
    newest, _ = stage.catalog.models[model].snapshots
    stage.storage.damaged.add(newest.key)
    stage.crash_server()
    stage.start_worker()
    save = stage.save(model, 13, "a")
    stage.settle()
    worker = stage.worker
    assert worker and [type(sent.command) for sent in worker.inbox] == [LoadAdapter, SaveAdapter]
    while worker.inbox:
        stage.execute_next()
    worker.outbox.reverse()
    stage.run()
    assert not stage.error(save) and stage.catalog.checkpoints[path_of(model, "a")]
    Reference(stage).check()


def test_a_base_that_a_dead_worker_never_answered_holds_no_later_save():
    """A run is brought for a save that is refused, leaves its slot at once, and the worker dies before any answer."""
    stage = Stage(info=msgspec.structs.replace(INFO, num_training_slots=1))
    model, other = stage.model(), stage.model()
    stage.train(model, 6)
    stage.save(model, 13, "a")
    stage.run()
    stage.crash_server()
    stage.start_worker()
    refused = stage.save(model, 14, "a")
    stage.forward_backward(other, 1)
    stage.settle()
    worker = stage.worker
    assert worker and [type(sent.command) for sent in worker.inbox][:2] == [LoadAdapter, CreateAdapter]
    assert "exists already" in stage.error(refused) and not stage.is_resident(model)
    stage.crash_worker()
    stage.start_worker()
    save = stage.save(model, 15, "b")
    stage.run()
    assert not stage.error(save)
    Reference(stage).check()


def test_an_export_may_leave_the_unembedding_out(stage: Stage):
    """For tools that merge into a model with tied embeddings. What is listed is what was written."""
    model = stage.model()
    save = SaveWeights(model_id=model, seq_id=1, kind="external_weights", name="out", exclude_unembed=True)
    saved = stage.submit_now(save)
    stage.run()
    assert not stage.error(saved)
    (command,) = [command for command in stage.executed if isinstance(command, SaveAdapter)]
    assert command.config.train_attn and not command.config.train_unembed
    assert stage.catalog.checkpoints[f"tinker://{model}/external_weights/out"].lora == command.config


def test_a_save_that_storage_does_not_take_is_counted(stage: Stage):
    model = stage.model()
    stage.storage.is_down = True
    stage.save(model, 1, "a")
    stage.run()
    assert stage.state.training.failures == {("save", "storage"): 1}
