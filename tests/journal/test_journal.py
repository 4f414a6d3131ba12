"""The journal actor over the driver in memory, whose disk fails, stalls and dies on demand."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest

from tx_async.errors import LeaseHeld, Overloaded, StorageError
from tx_async.journal.journal import CHANGE_BYTES, Journal
from tx_async.journal.lease import Holder
from tx_async.testing.memory_journal import Fault, MemoryDisk, MemoryJournal
from tx_async.wire.records import Change, Put, RequestRecord, ResultRecord, SessionRecord


def put(name: str) -> list[Change]:
    return [Put(SessionRecord(session_id=name, owner="alice", created_at=1.0))]


def put_request(name: str, body: bytes) -> list[Change]:
    record = RequestRecord(
        request_id=name, owner="a", kind="OptimStep", subject="m", seq_id=1, body_digest="", body_bytes=0, created_at=0
    )
    return [Put(record, body)]


@pytest.fixture
def driver() -> MemoryJournal:
    return MemoryJournal(MemoryDisk())


@pytest.fixture
async def journal(driver: MemoryJournal) -> AsyncIterator[Journal]:
    journal = Journal(driver, transaction_changes_max=10, transaction_bytes_max=1_000_000)
    await journal.open()
    yield journal
    await journal.close()


def durable_sessions(driver: MemoryJournal) -> list[str]:
    return list(driver.disk.tables["session"])


async def test_commit_returns_after_it_is_durable(journal: Journal, driver: MemoryJournal):
    driver.faults.append(Fault(delay_s=0.02))
    commit = asyncio.create_task(journal.commit(put("a")))
    await asyncio.sleep(0.005)
    assert not commit.done() and durable_sessions(driver) == []
    await commit
    assert durable_sessions(driver) == ["a"]


async def test_what_arrives_during_a_transaction_joins_the_next(journal: Journal, driver: MemoryJournal):
    driver.faults.append(Fault(delay_s=0.02))
    first = asyncio.create_task(journal.commit(put("first")))
    await asyncio.sleep(0.005)
    others = [asyncio.create_task(journal.commit(put(f"s{i}"))) for i in range(9)]
    await asyncio.gather(first, *others)
    assert driver.disk.num_transactions == 2
    assert durable_sessions(driver) == ["first", *(f"s{i}" for i in range(9))]


async def test_transactions_keep_the_order_and_their_limits(journal: Journal, driver: MemoryJournal):
    names = [f"s{i}" for i in range(95)]
    await asyncio.gather(*(journal.commit(put(name)) for name in names))
    assert durable_sessions(driver) == names
    assert driver.disk.num_transactions == 10


async def test_a_transaction_takes_bodies_up_to_its_bytes_and_at_least_one(journal: Journal, driver: MemoryJournal):
    bodies = [600_000, 300_000, 300_000, 2_000_000, 10]
    await asyncio.gather(*(journal.commit(put_request(f"r{i}", bytes(size))) for i, size in enumerate(bodies)))
    assert driver.disk.num_transactions == 4  # 600k + 300k, 300k, 2M alone, the last
    assert list(driver.disk.tables["request"]) == [f"r{i}" for i in range(5)]


async def test_one_commit_is_atomic(journal: Journal, driver: MemoryJournal):
    """A request and its result in one commit: a crash never separates them, even when they exceed a transaction's
    limit.
    """
    changes = [change for i in range(25) for change in put(f"s{i}")]
    driver.faults.append(Fault(error="disk full"))
    with pytest.raises(StorageError):
        await journal.commit(changes)
    assert durable_sessions(driver) == []
    await journal.commit(changes)
    assert len(durable_sessions(driver)) == 25


async def test_failure_reaches_every_waiter_of_its_transaction_and_no_other(
    journal: Journal, driver: MemoryJournal, caplog: pytest.LogCaptureFixture
):
    """The disk is full for one transaction. Its ten callers learn why; the eleventh, in the next one, never notices."""
    driver.faults.append(Fault(error="No space left on device"))
    with caplog.at_level(logging.ERROR):
        outcomes = await asyncio.gather(*(journal.commit(put(f"s{i}")) for i in range(11)), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes[:10]] == ["No space left on device"] * 10
    assert all(isinstance(outcome, StorageError) for outcome in outcomes[:10])
    assert outcomes[10] is None
    assert durable_sessions(driver) == ["s10"]
    statistics = journal.statistics()
    assert (statistics.commits, statistics.failed_commits, statistics.changes) == (1, 1, 1)
    assert (statistics.waiting_changes, statistics.waiting_bytes) == (0, 0)
    assert "No space left on device" in caplog.text


async def test_a_cancelled_caller_does_not_take_its_changes_back(journal: Journal, driver: MemoryJournal):
    driver.faults.append(Fault(delay_s=0.01))
    commit = asyncio.create_task(journal.commit(put("a")))
    await asyncio.sleep(0.002)
    commit.cancel()
    await journal.commit(put("b"))
    assert commit.cancelled()
    assert durable_sessions(driver) == ["a", "b"]


async def test_append_queues_at_once_and_in_order(journal: Journal, driver: MemoryJournal):
    futures = [journal.append(put(f"s{i}")) for i in range(3)]
    assert journal.statistics().waiting_changes == 3
    await asyncio.gather(*futures)
    assert durable_sessions(driver) == ["s0", "s1", "s2"]


async def test_nothing_to_commit_is_durable_at_once(journal: Journal, driver: MemoryJournal):
    assert journal.append([]).done()
    assert driver.disk.num_transactions == 0


async def test_full_mailbox_refuses_new_work_but_not_results_of_accepted_work(driver: MemoryJournal):
    journal = Journal(driver, waiting_changes_max=3, waiting_bytes_max=1_000_000)
    await journal.open()
    waiting = [journal.append(put(f"s{i}")) for i in range(3)]
    with pytest.raises(Overloaded, match="Try again"):
        journal.append(put("refused"))
    result = ResultRecord(request_id="r", finished_at=1.0, content="json", payload=b"{}")
    waiting.append(journal.append([Put(result)], may_refuse=False))
    await asyncio.gather(*waiting)
    await journal.commit(put_request("r", bytes(900_000)))
    with pytest.raises(Overloaded):
        await journal.commit(put_request("too large", bytes(1_000_001 - CHANGE_BYTES)))
    await journal.commit(put("room again"))
    await journal.close()
    assert durable_sessions(driver) == ["s0", "s1", "s2", "room again"]
    assert list(driver.disk.tables["result"]) == ["r"]


async def test_close_drains(driver: MemoryJournal):
    journal = Journal(driver, transaction_changes_max=2)
    await journal.open()
    driver.faults.append(Fault(delay_s=0.01))
    commits = [journal.append(put(f"s{i}")) for i in range(7)]
    await journal.close()
    assert all(commit.done() for commit in commits)
    assert durable_sessions(driver) == [f"s{i}" for i in range(7)]
    with pytest.raises(StorageError, match="closed"):
        await journal.commit(put("late"))
    assert driver.disk.holder is None


async def test_crash_before_the_commit_loses_only_what_was_not_acknowledged(driver: MemoryJournal):
    journal = Journal(driver)
    await journal.open()
    await journal.commit(put("acknowledged"))
    driver.faults.append(Fault(crash="before"))
    with pytest.raises(StorageError):
        await journal.commit(put("lost"))
    await journal.close()
    successor = Journal(MemoryJournal(driver.disk))
    assert [record.key for record in await successor.open()] == ["acknowledged"]
    await successor.close()


async def test_crash_after_the_commit_keeps_what_nobody_heard_of(driver: MemoryJournal):
    journal = Journal(driver)
    await journal.open()
    driver.faults.append(Fault(crash="after"))
    with pytest.raises(StorageError):
        await journal.commit(put("durable"))
    await journal.close()
    successor = Journal(MemoryJournal(driver.disk))
    assert [record.key for record in await successor.open()] == ["durable"]
    await successor.commit(put("durable") + put("more"))
    assert list(driver.disk.tables["session"]) == ["durable", "more"]
    await successor.close()


async def test_lost_lease_ends_the_supervisor_and_refuses_everything(driver: MemoryJournal):
    """Another server has taken over after a long partition. This one must stop, and must not write on the way out."""
    journal = Journal(driver)
    await journal.open()
    supervisor = asyncio.create_task(journal.run())
    await journal.commit(put("mine"))
    assert not supervisor.done()
    driver.steal(Holder(instance="x", host="elsewhere", pid=7, since=0.0))
    with pytest.raises(LeaseHeld, match="process 7 on host elsewhere"):
        await journal.commit(put("not mine"))
    with pytest.raises(LeaseHeld, match="elsewhere"):
        await supervisor
    with pytest.raises(LeaseHeld):
        await journal.commit(put("neither"))
    await journal.close()
    assert durable_sessions(driver) == ["mine"]
    assert driver.disk.holder is not None and driver.disk.holder.host == "elsewhere"


async def test_supervisor_ends_quietly_with_close(driver: MemoryJournal):
    journal = Journal(driver)
    await journal.open()
    supervisor = asyncio.create_task(journal.run())
    await journal.commit(put("a"))
    await journal.close()
    await supervisor


async def test_repr_is_the_operators_view(journal: Journal):
    await journal.commit(put("a"))
    text = repr(journal)
    assert text.startswith("<Journal open on <MemoryJournal on <MemoryDisk [1 session")
    assert "Changes: 1 durable, 0 waiting | Commits: 1, 0 failed" in text
    await journal.close()
    assert repr(journal).startswith("<Journal closed")
