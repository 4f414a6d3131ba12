"""Reduces a list of changes to the keys to delete and then the rows to put, for each table.

Changes of different keys commute, and of one key only the last matters, so every driver needs two statements a table
however many changes a transaction carries.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

import msgspec

from tx_async.errors import ContentLost, NotFound
from tx_async.wire.records import (
    Change,
    Delete,
    DropBody,
    Put,
    ResultRecord,
    decode_record,
    encode_record,
    type_of,
)

Row = TypeVar("Row")

RESULT_INLINE_BYTES_MAX = 512
"""Larger payloads of results are stored like bodies of requests, so that a start does not read them."""


class TableChanges(Generic[Row]):
    """Apply `deletes` first, then `puts` in their order: a key in both is a new insertion, one in `puts` alone an
    upsert.
    """

    def __init__(self) -> None:
        self.deletes: dict[str, None] = {}
        self.puts: dict[str, Row] = {}

    def put(self, key: str, row: Row) -> None:
        self.puts[key] = row

    def delete(self, key: str) -> None:
        self.puts.pop(key, None)
        self.deletes[key] = None


class Transaction:
    """The changes of one transaction, by table. `bodies` is the table `request_body`."""

    def __init__(self, changes: Iterable[Change]):
        #: only those that have changes
        self.tables: defaultdict[str, TableChanges[bytes]] = defaultdict(TableChanges)
        self.bodies: TableChanges[bytes] = TableChanges()
        for change in changes:
            self._add(change)

    def _add(self, change: Change) -> None:
        match change:
            case Put(record=record, body=body):
                table = type_of(record)
                if isinstance(record, ResultRecord) and len(record.payload) > RESULT_INLINE_BYTES_MAX:
                    self.bodies.put(payload_key(record.key), record.payload)
                    record = msgspec.structs.replace(record, payload=b"")
                self.tables[table].put(record.key, encode_record(record))
                if body is not None:
                    self.bodies.put(body_key(table, record.key), body)
            case Delete(table=table, key=key):
                self.tables[table].delete(key)
                if table == "request":
                    self.bodies.delete(key)
                elif table == "result":
                    self.bodies.delete(payload_key(key))
                elif table == "recording":
                    self.bodies.delete(recording_key(key))
            case DropBody(request_id=request_id):
                self.bodies.delete(request_id)


def body_key(table: str, key: str) -> str:
    """The key under which the table of bodies has a record's body."""
    assert table in ("request", "recording"), f"a {table} has no body"
    return key if table == "request" else recording_key(key)


def recording_key(sequence_id: str) -> str:
    return f"recording/{sequence_id}"


def payload_key(request_id: str) -> str:
    """The key under which the table of bodies has a result's payload. Request ids have no slash, so none collides."""
    return f"result/{request_id}"


async def read_result(request_id: str, row: bytes | None, read_body: Callable[[str], Awaitable[bytes]]) -> ResultRecord:
    """A whole result from its row. Raises `NotFound` when there is none, `ContentLost` when its payload is damaged."""
    if row is None:
        raise NotFound(f"The journal has no result of request {request_id} (any more).")
    record = decode_record(row)
    assert isinstance(record, ResultRecord)
    if record.payload:
        return record
    return msgspec.structs.replace(record, payload=await read_body(payload_key(request_id)))


def checksum(body: bytes) -> bytes:
    """Sixteen bytes of blake2b, stored beside each body."""
    return hashlib.blake2b(body, digest_size=16).digest()


def verify(request_id: str, body: bytes, num_bytes: int, expected: bytes) -> bytes:
    """Returns the body. Raises `ContentLost` when its bytes are not those that were stored."""
    if len(body) != num_bytes:
        raise ContentLost(f"The journal's body of request {request_id} is damaged: {len(body)} bytes of {num_bytes}.")
    if (actual := checksum(body)) != expected:
        difference = f"checksum {actual.hex()} instead of {expected.hex()}"
        raise ContentLost(f"The journal's body of request {request_id} is damaged: {difference}.")
    return body
