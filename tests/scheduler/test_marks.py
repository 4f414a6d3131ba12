"""A record that ends the process is found out by the marks of what was worked on, and set aside."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.stage import Stage
from tx_async.errors import InvalidRequest
from tx_async.journal.marks import map_marks
from tx_async.scheduler.core import marks as marking
from tx_async.scheduler.core.marks import NUM_BYTES, ReplayMarks
from tx_async.scheduler.training import micro_batches


class Killed(BaseException):
    """What a process does not survive."""


def dies(memory: bytearray, stage: marking.Stage = "run", request_id: str = "a") -> ReplayMarks:
    marks = ReplayMarks(memory)
    with pytest.raises(Killed), marks.of(stage, request_id):
        raise Killed
    return marks


def test_the_second_death_at_one_step_tells():
    memory = bytearray(NUM_BYTES)
    assert not dies(memory).poisoned
    assert not dies(memory).poisoned
    assert ReplayMarks(memory).poisoned == "a"


def test_deaths_at_other_records_or_steps_are_chance():
    memory = bytearray(NUM_BYTES)
    dies(memory)
    dies(memory, request_id="b")
    dies(memory)
    dies(memory, "read")
    assert not ReplayMarks(memory).poisoned


def test_what_is_survived_is_no_suspect_any_more():
    memory = bytearray(NUM_BYTES)
    dies(memory)
    with ReplayMarks(memory).of("run", "a"):
        pass
    dies(memory)
    assert not ReplayMarks(memory).poisoned


def test_an_error_that_is_an_answer_is_no_death():
    memory = bytearray(NUM_BYTES)
    with pytest.raises(InvalidRequest), ReplayMarks(memory).of("run", "a"):
        raise InvalidRequest("too long")
    assert not dies(memory).poisoned and not ReplayMarks(memory).poisoned


def test_a_step_within_another_is_the_one_to_blame():
    memory = bytearray(NUM_BYTES)
    for _ in range(2):
        marks = ReplayMarks(memory)
        with pytest.raises(Killed), marks.of("restore", "a"):
            with marks.of("run", "c"):
                pass
            with marks.of("run", "b"):
                raise Killed
    assert ReplayMarks(memory).poisoned == "b"


def test_marks_are_in_the_file_while_the_process_lives(tmp_path: Path):
    """Nothing is flushed: another process that maps the file sees what this one has written."""
    marks = ReplayMarks(map_marks(tmp_path / "data", "f00d", NUM_BYTES))
    with marks.of("run", "a"):
        (file,) = (tmp_path / "data").iterdir()
        assert file.read_bytes().startswith(b"run a\0")
    assert file.stat().st_mode & 0o777 == 0o600


@contextmanager
def poison(monkeypatch: pytest.MonkeyPatch, request_id: str) -> Iterator[None]:
    """The server dies whenever this request is packed."""
    prepare = micro_batches.MicroBatches.prepare

    def deadly(self, step, info):
        if step.request_id == request_id:
            raise Killed
        prepare(self, step, info)

    with monkeypatch.context() as patch:
        patch.setattr(micro_batches.MicroBatches, "prepare", deadly)
        yield


def lives(stage: Stage) -> bool:
    """The server starts and runs what there is; False when it dies of it."""
    stage.crash_server()
    try:
        stage.start_worker()
        stage.run()
    except Killed:
        return False
    return True


def test_a_request_that_ends_the_server_fails_alone(stage: Stage, monkeypatch, caplog: pytest.LogCaptureFixture):
    """Two deaths are taken; the third start sets it aside, and what came after it runs."""
    model, other = stage.model(), stage.model()
    stage._end_worker()
    poisoned = stage.forward_backward(model, 1)
    after = [stage.forward_backward(model, 2), stage.optim_step(model, 3), stage.forward_backward(other, 1)]
    with poison(monkeypatch, poisoned):
        assert [lives(stage) for _ in range(3)] == [False, False, True]
    assert "was set aside" in stage.error(poisoned)
    assert not any(map(stage.error, after))
    (line,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert poisoned in line.getMessage() and "it is set aside" in line.getMessage()
    assert lives(stage)
    clean = Stage()
    same = clean.model()
    clean.forward_backward(same, 1)
    clean.optim_step(same, 2)
    stage.optim_step(model, 4)
    clean.optim_step(same, 3)
    stage.run()
    clean.run()
    assert stage.adapter(model) == clean.adapter(same)


def test_a_reported_effect_that_cannot_be_repeated_ends_its_run_and_no_other(stage: Stage, monkeypatch):
    model, other = stage.model(), stage.model()
    poisoned = stage.forward_backward(model, 1)
    stage.forward_backward(other, 1)
    stage.run()
    pending = [stage.optim_step(model, 2), stage.optim_step(other, 2)]
    with poison(monkeypatch, poisoned):
        assert [lives(stage) for _ in range(3)] == [False, False, True]
    assert "corrupted" in stage.error(pending[0])
    assert not stage.error(pending[1])
    assert stage.catalog.models[model].status == "corrupted"
