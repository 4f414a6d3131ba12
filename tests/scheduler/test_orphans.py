"""Snapshots that were written when the worker or the server died, and that no record names."""

import pytest

from tests.support.reference import Reference
from tests.support.stage import Stage
from tx_async.scheduler.training.orphans import LOOK_AFTER_S
from tx_async.wire.operations import UnloadModel
from tx_async.wire.worker import SaveAdapter


def snapshots(stage: Stage) -> list[str]:
    return [key for key in stage.storage.files if "/snapshots/" in key]


def written_and_not_told(stage: Stage, model: str) -> str:
    """The files of a snapshot are there; the worker has not said so yet. Their key."""
    stage.train(model, 3)
    stage.run_until_next(lambda sent: isinstance(sent.command, SaveAdapter))
    stage.execute_next()
    worker = stage.worker
    assert worker is not None
    command = worker.saving[-1].command
    assert isinstance(command, SaveAdapter)
    worker.engine.finish_save(command.key)
    worker.saving.clear()
    return command.key


@pytest.mark.parametrize("who", ["worker", "server"])
def test_what_a_death_has_left_is_removed_and_nothing_else(stage: Stage, who: str):
    model = stage.model()
    orphan = written_and_not_told(stage, model)
    stage.crash_worker() if who == "worker" else stage.crash_server()
    stage.start_worker()
    stage.run()
    assert orphan in stage.storage.files
    stage.wait(LOOK_AFTER_S)
    stage.run()
    named = {snapshot.key for snapshot in stage.catalog.models[model].snapshots}
    assert orphan not in stage.storage.files and named and set(snapshots(stage)) == named
    Reference(stage).check()


def test_storage_that_does_not_answer_is_asked_again(stage: Stage):
    model = stage.model()
    orphan = written_and_not_told(stage, model)
    stage.crash_server()
    stage.start_worker()
    stage.run()
    stage.storage.is_down = True
    stage.wait(LOOK_AFTER_S)
    stage.storage.is_down = False
    assert orphan in stage.storage.files
    stage.wait(LOOK_AFTER_S)
    assert orphan not in stage.storage.files


def test_a_run_that_ends_meanwhile_takes_all_its_snapshots_with_it(stage: Stage):
    model = stage.model()
    written_and_not_told(stage, model)
    stage.crash_server()
    stage.start_worker()
    stage.run()
    stage.submit_now(UnloadModel(model_id=model))
    stage.wait(LOOK_AFTER_S)
    stage.run()
    assert snapshots(stage) == []
