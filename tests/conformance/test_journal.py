"""One list of behaviours for every journal driver. A driver is ready when all of them pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from tx_async.errors import LeaseHeld, NotFound, StorageError
from tx_async.journal.journal import Driver, Journal
from tx_async.journal.sqlite import SqliteDriver
from tx_async.journal.transaction import RESULT_INLINE_BYTES_MAX, payload_key, recording_key
from tx_async.testing.memory_journal import MemoryDisk, MemoryJournal
from tx_async.wire.records import (
    AuditRecord,
    CheckpointRecord,
    Delete,
    DropBody,
    HistoryRecord,
    ModelRecord,
    Put,
    Record,
    RecordedSequence,
    RequestRecord,
    ResultRecord,
    SamplerRecord,
    SessionRecord,
)
from tx_async.wire.worker import AdapterConfig

LARGE = 200 * 1024
"""A body of so many bytes is stored outside SQLite."""

NewDriver = Callable[[], Driver]


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def new_driver(request: pytest.FixtureRequest, tmp_path: Path) -> NewDriver:
    """Makes drivers of one and the same database, as server after server would."""
    if request.param == "memory":
        disk = MemoryDisk()
        return lambda: MemoryJournal(disk)
    if request.param == "sqlite":
        return lambda: SqliteDriver(tmp_path / "tx.db")
    url = request.getfixturevalue("postgres_url")
    from tx_async.journal.postgres import PostgresDriver

    return lambda: PostgresDriver(url, lease_wait_s=0.5)


@pytest.fixture
async def driver(new_driver: NewDriver) -> AsyncIterator[Driver]:
    driver = new_driver()
    await driver.open()
    yield driver
    await driver.close()


async def reopened(driver: Driver, new_driver: NewDriver) -> Driver:
    await driver.close()
    successor = new_driver()
    await successor.open()
    return successor


def session(name: str, status: str = "active") -> SessionRecord:
    return SessionRecord(session_id=name, owner="alice", created_at=1.5, status=status)  # type: ignore[arg-type]


def request_record(name: str, seq_id: int = 1) -> RequestRecord:
    return RequestRecord(
        request_id=name,
        owner="alice",
        kind="OptimStep",
        subject="s:train:0",
        seq_id=seq_id,
        body_digest="d",
        body_bytes=3,
        created_at=2.5,
    )


def one_of_each() -> list[Record]:
    lora = AdapterConfig(rank=8, seed=3)
    return [
        session("s"),
        ModelRecord(model_id="s:train:0", session_id="s", owner="alice", base_model="b", lora=lora, created_at=1.0),
        SamplerRecord(sampler_id="s:sample:0", session_id="s", owner="alice", base_model="b", created_at=1.0),
        request_record("r"),
        ResultRecord(request_id="r", finished_at=3.0, content="json", payload=b"\x00\xff"),
        CheckpointRecord(
            path="tinker://s:train:0/weights/ünïcode 名",
            model_id="s:train:0",
            owner="alice",
            kind="weights",
            name="ünïcode 名",
            storage_key="k",
            base_model="b",
            lora=lora,
            created_at=4.0,
            size_bytes=2**40,
        ),
        AuditRecord(event_id="000000000007", at=2.5, event="run.created", subject="m", owner="o", details={"rank": 8}),
        RecordedSequence(sequence_id="s:1:0", session_id="s", owner="alice", base_model="b", num_bytes=9, used_at=5.0),
        HistoryRecord(model_id="s:train:0", number=1, columns=("loss:sum",), values=b"\0" * 8),
    ]


async def test_new_journal_is_empty(driver: Driver):
    assert await driver.load() == []


async def test_every_record_type_comes_back_equal(driver: Driver, new_driver: NewDriver):
    records = one_of_each()
    await driver.apply([Put(record) for record in records])
    driver = await reopened(driver, new_driver)
    assert await driver.load() == records
    await driver.close()


async def test_put_replaces_and_keeps_its_place(driver: Driver):
    await driver.apply([Put(session("a")), Put(session("b")), Put(session("c"))])
    await driver.apply([Put(session("a", "errored"))])
    assert await driver.load() == [session("a", "errored"), session("b"), session("c")]


async def test_deleted_and_inserted_again_comes_last(driver: Driver):
    await driver.apply([Put(session("a")), Put(session("b"))])
    await driver.apply([Delete("session", "a"), Put(session("a"))])
    assert await driver.load() == [session("b"), session("a")]


async def test_order_of_insertion_survives_many_transactions(driver: Driver, new_driver: NewDriver):
    names = [f"s{(7 * i) % 50}" for i in range(50)]
    for start in range(0, 50, 5):
        await driver.apply([Put(session(name)) for name in names[start : start + 5]])
    await driver.apply([Delete("session", name) for name in names[-3:]])
    await driver.apply([Put(session("new"))])
    driver = await reopened(driver, new_driver)
    assert [record.key for record in await driver.load()] == [*names[:-3], "new"]
    await driver.close()


async def test_last_change_of_a_key_in_one_transaction_wins(driver: Driver):
    await driver.apply(
        [
            Put(session("a")),
            Put(session("a", "errored")),
            Put(session("b")),
            Delete("session", "b"),
            Delete("session", "c"),
            Put(session("c")),
        ]
    )
    assert await driver.load() == [session("a", "errored"), session("c")]


async def test_deleting_what_is_not_there_is_fine(driver: Driver):
    await driver.apply([Delete("request", "nobody"), DropBody("nobody"), Delete("checkpoint", "nothing")])
    assert await driver.load() == []


async def test_same_key_in_two_tables_is_two_records(driver: Driver):
    result = ResultRecord(request_id="r", finished_at=1.0, content="json", payload=b"{}")
    await driver.apply([Put(request_record("r"), b"body"), Put(result)])
    await driver.apply([Delete("result", "r")])
    assert await driver.load() == [request_record("r")]
    assert await driver.read_body("r") == b"body"


@pytest.mark.parametrize("num_bytes", [0, 1, 65_536, 65_537, LARGE])
async def test_body_comes_back_equal(driver: Driver, new_driver: NewDriver, num_bytes: int):
    body = bytes(i * 31 % 256 for i in range(num_bytes))
    await driver.apply([Put(request_record("r"), body)])
    assert await driver.read_body("r") == body
    driver = await reopened(driver, new_driver)
    assert await driver.read_body("r") == body
    await driver.close()


async def test_update_without_body_keeps_the_body(driver: Driver):
    await driver.apply([Put(request_record("r"), b"x" * LARGE)])
    await driver.apply([Put(request_record("r", seq_id=9))])
    assert await driver.load() == [request_record("r", seq_id=9)]
    assert await driver.read_body("r") == b"x" * LARGE


@pytest.mark.parametrize("first, second", [(3, LARGE), (LARGE, 3), (LARGE, LARGE)])
async def test_put_with_another_body_replaces_the_body(driver: Driver, first: int, second: int):
    await driver.apply([Put(request_record("r"), b"1" * first)])
    await driver.apply([Put(request_record("r"), b"2" * second)])
    assert await driver.read_body("r") == b"2" * second


@pytest.mark.parametrize("num_bytes", [3, LARGE])
async def test_drop_body_frees_the_body_and_keeps_the_record(driver: Driver, num_bytes: int):
    await driver.apply([Put(request_record("r"), b"x" * num_bytes)])
    await driver.apply([DropBody("r")])
    assert await driver.load() == [request_record("r")]
    with pytest.raises(StorageError, match="no body of request r"):
        await driver.read_body("r")


@pytest.mark.parametrize("num_bytes", [3, LARGE])
async def test_deleting_a_request_deletes_its_body(driver: Driver, num_bytes: int):
    await driver.apply([Put(request_record("r"), b"x" * num_bytes)])
    await driver.apply([Delete("request", "r")])
    assert await driver.load() == []
    with pytest.raises(StorageError, match="no body of request r"):
        await driver.read_body("r")


@pytest.mark.parametrize("num_bytes", [3, LARGE])
async def test_a_recorded_sequence_keeps_its_body_until_it_is_deleted(driver: Driver, num_bytes: int):
    record = RecordedSequence(
        sequence_id="s:1:0", session_id="s", owner="o", base_model="b", num_bytes=num_bytes, used_at=1.0
    )
    body = bytes(num_bytes)
    await driver.apply([Put(record, body)])
    await driver.apply([Put(msgspec.structs.replace(record, used_at=2.0))])
    assert await driver.read_body(recording_key("s:1:0")) == body
    await driver.apply([Delete("recording", "s:1:0")])
    with pytest.raises(StorageError, match="no body"):
        await driver.read_body(recording_key("s:1:0"))


async def test_body_of_an_unknown_request_is_an_error(driver: Driver):
    with pytest.raises(StorageError, match="nobody"):
        await driver.read_body("nobody")


async def test_bodies_are_readable_while_transactions_run(driver: Driver):
    await driver.apply([Put(request_record(f"r{i}"), b"%d" % i * LARGE) for i in range(4)])
    writes = [driver.apply([Put(session(f"s{i}"))]) for i in range(10)]
    reads = [driver.read_body(f"r{i % 4}") for i in range(20)]
    bodies = (await asyncio.gather(asyncio.gather(*reads), *(_one_after_another(writes),)))[0]
    assert bodies == [b"%d" % (i % 4) * LARGE for i in range(20)]


async def _one_after_another(coroutines) -> None:
    for coroutine in coroutines:
        await coroutine


async def test_transaction_that_cannot_be_stored_leaves_nothing(driver: Driver, new_driver: NewDriver):
    """A key that is no text makes the last change of a transaction impossible: the first must not be there either."""
    with pytest.raises(Exception, match="surrogates not allowed") as caught:
        await driver.apply([Put(session("good")), Delete("session", "\ud800")])
    assert not isinstance(caught.value, StorageError)
    assert await driver.load() == []
    driver = await reopened(driver, new_driver)
    assert await driver.load() == []
    await driver.close()


async def test_second_server_is_refused_by_the_holders_name(driver: Driver, new_driver: NewDriver):
    second = new_driver()
    with pytest.raises(LeaseHeld, match=r"process \d+ on host \S+ since"):
        await second.open()
    await second.close()
    await driver.apply([Put(session("still mine"))])


async def test_lease_is_free_after_close(driver: Driver, new_driver: NewDriver):
    successor = await reopened(driver, new_driver)
    await successor.apply([Put(session("a"))])
    await successor.close()


async def test_close_twice_and_after_a_refused_open_is_safe(driver: Driver, new_driver: NewDriver):
    refused = new_driver()
    with pytest.raises(LeaseHeld):
        await refused.open()
    await refused.close()
    await refused.close()
    await driver.close()
    await driver.close()


async def test_closed_driver_refuses_to_write(driver: Driver):
    await driver.close()
    with pytest.raises(StorageError, match="closed"):
        await driver.apply([Put(session("late"))])


async def test_commits_at_once_coalesce_into_few_transactions(new_driver: NewDriver):
    journal = Journal(new_driver())
    assert await journal.open() == []
    await asyncio.gather(*(journal.commit([Put(session(f"s{i}"))]) for i in range(500)))
    statistics = journal.statistics()
    await journal.close()
    assert (statistics.changes, statistics.waiting_changes, statistics.waiting_bytes) == (500, 0, 0)
    assert statistics.commits <= 5
    journal = Journal(new_driver())
    assert [record.key for record in await journal.open()] == [f"s{i}" for i in range(500)]
    await journal.close()


async def test_commit_that_cannot_be_stored_fails_alone(new_driver: NewDriver):
    journal = Journal(new_driver())
    await journal.open()
    commits = [[Put(session("a"))], [Delete("session", "\ud800")], [Put(session("b"))]]
    outcomes = await asyncio.gather(*map(journal.commit, commits), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), StorageError, type(None)]
    await journal.close()
    journal = Journal(new_driver())
    assert await journal.open() == [session("a"), session("b")]
    await journal.close()


@pytest.mark.parametrize("num_bytes", [1, 600, LARGE])
async def test_results_come_back_whole_but_a_start_reads_only_small_ones(
    driver: Driver, new_driver: NewDriver, num_bytes: int
):
    """Results are kept for a day, in case a client asks again: their payloads must not all be in memory."""
    result = ResultRecord(request_id="r", finished_at=1.0, content="sample", payload=b"\x01" * num_bytes)
    await driver.apply([Put(result)])
    driver = await reopened(driver, new_driver)
    assert await driver.read_result("r") == result
    (loaded,) = await driver.load()
    assert isinstance(loaded, ResultRecord) and len(loaded.payload) <= RESULT_INLINE_BYTES_MAX
    await driver.close()


async def test_a_deleted_result_takes_its_payload_along(driver: Driver):
    result = ResultRecord(request_id="r", finished_at=1.0, content="sample", payload=bytes(LARGE))
    await driver.apply([Put(result)])
    await driver.apply([Delete("result", "r")])
    with pytest.raises(NotFound):
        await driver.read_result("r")
    with pytest.raises(StorageError):
        await driver.read_body(payload_key("r"))
