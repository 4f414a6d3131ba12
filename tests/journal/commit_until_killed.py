"""Commit requests with bodies as fast as the disk allows, writing each acknowledged id to stdout. Somebody kills
this.
"""

import asyncio
import os
import sys

from tx_async.journal.factory import driver_for
from tx_async.journal.journal import Journal
from tx_async.wire.records import Put, RequestRecord


def request(name: str) -> RequestRecord:
    return RequestRecord(
        request_id=name, owner="a", kind="OptimStep", subject="m", seq_id=1, body_digest="", body_bytes=0, created_at=0
    )


async def client(journal: Journal, client: int) -> None:
    for number in range(1_000_000):
        name = f"{client}-{number}"
        # One in eight bodies is large enough for a file.
        body = name.encode() * (20_000 if number % 8 == client else 2)
        await journal.commit([Put(request(name), body)])
        os.write(1, f"{name}\n".encode())


async def main(url: str, num_clients: int) -> None:
    journal = Journal(driver_for(url))
    await journal.open()
    os.write(1, b"open\n")
    await asyncio.gather(*(client(journal, number) for number in range(num_clients)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
