"""A run's history: one row for each optimizer step that was reported, however often the server dies, and a bounded
number of them."""

from collections.abc import Iterable
from itertools import pairwise

import msgspec
import pytest

from tests.scheduler.test_retention import DAY, end_session
from tests.support.chain_engine import NAN_TOKEN
from tests.support.simulation import POLICY
from tests.support.stage import Stage
from tx_async.scheduler.core.history import (
    BLOCK_ROWS,
    Histories,
    HistoryRow,
    decode_rows,
    encode_rows,
    gathered,
    kept,
)
from tx_async.wire.records import Change, Delete, HistoryRecord, Put, decode_record


def history(stage: Stage, model: str) -> list[HistoryRow]:
    return stage.catalog.histories.rows(model)


def summary(stage: Stage, model: str) -> list[tuple[float, ...]]:
    names = ("index", "step", "tokens", "sequences", "num_batches", "weights:sum")
    return [tuple(row.get(name, 0) for name in names) for row in history(stage, model)]


def on_disk(stage: Stage) -> list[HistoryRecord]:
    records = [decode_record(row) for row in stage.disk.tables["history"].values()]
    return [record for record in records if isinstance(record, HistoryRecord)]


# ---- which steps stay


def test_few_steps_all_stay():
    assert kept(range(8), 8) == list(range(8))


def test_of_many_the_newest_half_stays_whole_and_the_rest_evenly():
    assert kept(range(16), 8) == [0, 4, 8, 12, 13, 14, 15]


@pytest.mark.parametrize("steps_max", [2, 7, 64])
def test_a_history_that_grows_for_ever_stays_bounded_and_spans_the_run(steps_max: int):
    stay: list[int] = []
    for index in range(5_000):
        stay = kept([*stay, index], steps_max)
        assert len(stay) <= steps_max and stay[-1] == index
    assert stay == sorted(set(stay))
    if steps_max == 64:
        assert stay[0] == 0 and stay[-32:] == list(range(4_968, 5_000))
        gaps = [b - a for a, b in pairwise(stay)]
        assert max(gaps) <= 4 * 5_000 // 32


def test_thinning_twice_is_thinning_once():
    once = kept(range(1_000), 100)
    assert kept(once, 100) == once


# ---- rows and blocks


def test_rows_come_back_from_their_block_with_what_they_lack():
    rows = [{"index": 0.0, "loss:sum": 1.5}, {"index": 1.0, "grad_norm": 1e-300}]
    assert decode_rows(encode_rows("m", 1, rows)) == rows


def test_batches_add_up_by_the_part_behind_the_colon():
    first = gathered({}, {"loss:sum": 2.0, "gap:mean": 1.0, "gap:max": 3.0, "tokens": 5.0, "started_at": 7.0}, 1)
    both = gathered(first, {"loss:sum": 0.5, "gap:mean": 5.0, "gap:max": 2.0, "tokens": 4.0, "started_at": 9.0}, 3)
    assert both == {
        "sampled_tokens": 4,
        "loss:sum": 2.5,
        "gap:mean": 4.0,
        "gap:max": 3.0,
        "tokens": 9.0,
        "started_at": 7.0,
    }


def test_a_step_writes_a_small_record_whatever_came_before_it():
    histories, sizes = Histories(), []
    for index in range(500):
        changes = histories.append("m", {"index": float(index), "loss:sum": 0.5}, steps_max=100)
        apply(histories, changes)
        sizes.append(sum(len(record.values) for record in records_of(changes)))
    rows = histories.rows("m")
    assert len(rows) <= 100 + BLOCK_ROWS
    assert rows[0]["index"] == 0 and rows[-1]["index"] == 499
    assert sorted(sizes)[len(sizes) * 9 // 10] <= BLOCK_ROWS * 2 * 8
    apply(histories, histories.forget("m"))
    assert histories.rows("m") == [] and histories.num_bytes == 0


def records_of(changes: Iterable[Change]) -> list[HistoryRecord]:
    records = [change.record for change in changes if isinstance(change, Put)]
    return [record for record in records if isinstance(record, HistoryRecord)]


def apply(histories: Histories, changes: Iterable[Change]) -> None:
    for change in changes:
        if isinstance(change, Delete):
            histories.pop(change.key)
    for record in records_of(changes):
        histories.put(record)


# ---- what a run leaves


def test_each_optimizer_step_is_a_row_of_what_came_before_it(stage: Stage):
    model = stage.model()
    stage.forward_backward(model, 1, sizes=(3, 5))
    stage.forward_backward(model, 2, sizes=(4,))
    stage.forward_backward(model, 3, sizes=(7,), forward_only=True)
    stage.optim_step(model, 4)
    stage.forward_backward(model, 5, sizes=(6,))
    stage.optim_step(model, 6)
    stage.optim_step(model, 7)
    stage.run()
    assert summary(stage, model)[:2] == [(0, 1, 12, 3, 2, 12), (1, 2, 6, 1, 1, 6)]
    third = history(stage, model)[2]
    assert third["step"] == 3 and "tokens" not in third and third["finished_at"] >= third["started_at"]


def test_a_row_and_its_step_become_durable_together(stage: Stage):
    """However the server dies: as many rows on disk as optimizer steps that were reported."""
    model = stage.model()
    steps = [request for request in stage.train(model, 6)][1::2]
    for _ in range(200):
        reported = sum(stage.result(request) is not None for request in steps)
        assert sum(len(decode_rows(record)) for record in on_disk(stage) if record.number) == reported
        if not stage.step():
            break
    assert reported == 6


@pytest.mark.parametrize("crash_after", [1, 3, 4, 6, 8])
def test_a_crash_leaves_no_step_out_and_none_twice(stage: Stage, crash_after: int):
    model = stage.model()
    stage.forward_backward(model, 1, sizes=(3, 5))
    stage.forward_backward(model, 2, sizes=(4,))
    stage.optim_step(model, 3)
    stage.train(model, 2, first_seq_id=4)
    for _ in range(crash_after):
        stage.step()
    stage.crash_server()
    stage.start_worker()
    stage.run()
    assert summary(stage, model) == [(0, 1, 12, 3, 2, 12), (1, 2, 3, 1, 1, 3), (2, 3, 3, 1, 1, 3)]


def test_gradients_that_no_step_used_are_in_no_row(stage: Stage):
    """NaN gradients are dropped, and what is loaded begins without any."""
    model = stage.model()
    stage.save(model, 1, "a")
    stage.forward_backward(model, 2, token=NAN_TOKEN)
    failed = stage.optim_step(model, 3)
    stage.forward_backward(model, 4)
    stage.load(model, 5, f"tinker://{model}/weights/a")
    stage.forward_backward(model, 6, sizes=(4,))
    stage.optim_step(model, 7)
    stage.run()
    assert stage.error(failed)
    assert [row["tokens"] for row in history(stage, model)] == [4]


def test_a_long_run_s_history_is_bounded_on_disk():
    stage = Stage(policy=msgspec.structs.replace(POLICY, history_steps_max=40))
    model = stage.model()
    for round_ in range(10):
        stage.train(model, 10, first_seq_id=20 * round_ + 1)
        stage.run()
    rows = history(stage, model)
    assert len(rows) <= 40 + BLOCK_ROWS and rows[0]["index"] == 0 and rows[-1]["index"] == 99
    stage.crash_server()
    assert history(stage, model) == rows


def test_a_history_goes_with_its_run(stage: Stage):
    model = stage.model()
    stage.train(model, 2)
    stage.run()
    end_session(stage)
    stage.wait(31 * DAY)
    assert not stage.disk.tables["history"] and not history(stage, model)


def test_the_longest_unused_histories_go_when_all_are_too_large():
    stage = Stage(policy=msgspec.structs.replace(POLICY, history_bytes_max=1_000))
    first, second = stage.model(), stage.model()
    stage.train(first, 9)
    stage.run()
    stage.wait(2)
    stage.train(second, 9)
    stage.run()
    assert stage.catalog.histories.num_bytes > 1_000
    stage.wait(61)
    assert history(stage, first) == [] and len(history(stage, second)) == 9
