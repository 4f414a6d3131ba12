"""What is forgotten and when, so that nothing grows for ever."""

import msgspec
import pytest

from tests.support.simulation import POLICY
from tests.support.stage import Stage
from tx_async.errors import Conflict
from tx_async.scheduler.core.facts import CheckpointChanged, SessionChanged
from tx_async.wire.records import SessionRecord

DAY = 24 * 3600.0


def end_session(stage: Stage, name: str = "s") -> None:
    record = stage.catalog.sessions[name]
    stage.handle(SessionChanged(msgspec.structs.replace(record, status="success")))
    stage.settle()


def test_old_results_go_unless_a_replay_may_need_their_requests(stage: Stage):
    model = stage.model()
    requests = stage.train(model, 8)
    sample = stage.ask(stage.sampler())
    stage.run()
    stage.wait(1.5 * DAY)
    stage.run()
    stage.wait(61)
    assert stage.result(sample) is None and sample not in stage.disk.tables["request"]
    dropped = stage.catalog.models[model].dropped_seq_id
    kept = [request for request in requests if request in stage.disk.tables["request"]]
    assert dropped >= 6 and kept == requests[dropped:]
    with pytest.raises(Conflict, match="used up"):
        stage.forward_backward(model, 1, token=2)
    stage.crash_server()
    stage.start_worker()
    stage.train(model, 1, first_seq_id=17)
    stage.run()
    assert stage.lane(model).cursor == 19


def test_the_number_of_results_is_bounded_however_fast_they_come():
    stage = Stage(policy=msgspec.structs.replace(POLICY, results_kept_max=20))
    model = stage.model()
    for round_ in range(10):
        stage.train(model, 10, first_seq_id=20 * round_ + 1)
        stage.run()
        stage.wait(61)
    stage.run()
    assert len(stage.disk.tables["result"]) <= 20 + 14
    assert len(stage.disk.tables["request"]) <= 20 + 14
    assert len(stage.disk.bodies) <= 20
    assert len(stage.storage.files) == 2
    assert len(stage.lane(model).steps) <= 14


def test_expired_checkpoints_go_with_their_files(stage: Stage):
    model = stage.model()
    stage.save(model, 1, "a")
    stage.save(model, 2, "b")
    stage.run()
    path = f"tinker://{model}/weights/a"
    record = msgspec.structs.replace(stage.catalog.checkpoints[path], expires_at=stage.now + 10)
    stage.handle(CheckpointChanged(record))
    stage.wait(70)
    assert list(stage.catalog.checkpoints) == [f"tinker://{model}/weights/b"]
    assert not any("weights/a" in key for key in stage.storage.files)


def test_a_session_that_ended_long_ago_is_forgotten_with_its_runs_but_not_its_checkpoints(stage: Stage):
    with_checkpoint, without = stage.model(), stage.model()
    stage.train(with_checkpoint, 4)
    stage.train(without, 4)
    stage.save(with_checkpoint, 9, "a")
    stage.save_ephemeral(without, 9, number=0)
    stage.run()
    end_session(stage)
    stage.wait(31 * DAY)
    stage.run()
    assert list(stage.disk.tables["session"]) == [] and list(stage.disk.tables["sampler"]) == []
    assert list(stage.disk.tables["model"]) == [with_checkpoint]
    assert stage.catalog.models[with_checkpoint].status == "unloaded"
    assert [key for key in stage.storage.files if "weights/a" not in key] == []
    assert not stage.state.training.runs.lanes and not stage.disk.bodies
    stage.crash_server()


def test_a_session_whose_runs_are_in_use_is_not_forgotten(stage: Stage):
    model = stage.model()
    end_session(stage)
    for seq_id in range(1, 5):
        stage.wait(20 * DAY)
        stage.forward_backward(model, seq_id)
        stage.run()
    assert "s" in stage.catalog.sessions and model in stage.state.training.runs.lanes


def test_what_is_unfinished_when_its_session_is_forgotten_fails(stage: Stage):
    model = stage.model()
    waiting = stage.forward_backward(model, 2)
    stage.policy = POLICY
    end_session(stage)
    record = stage.catalog.sessions["s"]
    assert isinstance(record, SessionRecord)
    stage.state.retention._forget_session(record)
    stage._perform(stage.state.decisions.take())
    stage.settle()
    assert "has ended" in stage.error(waiting)


def test_a_long_run_keeps_memory_journal_and_storage_flat():
    stage = Stage(policy=msgspec.structs.replace(POLICY, results_kept_max=10, history_steps_max=16))
    models = [stage.model() for _ in range(3)]
    sizes = []
    for round_ in range(12):
        for model in models:
            stage.train(model, 4, first_seq_id=8 * round_ + 1)
        stage.ask(stage.sampler())
        stage.run()
        stage.wait(61)
        stage.run()
        records = sum(len(rows) for name, rows in stage.disk.tables.items() if name != "sampler")
        sizes.append((records, len(stage.disk.bodies), len(stage.storage.files)))
    assert max(sizes[6:]) <= max(sizes[:6])
