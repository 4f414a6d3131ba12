"""What a list of changes amounts to: for each table the keys to delete, then the rows to put.

Changes of different keys commute, and of one key only the last matters, so every driver needs two statements a table
however many changes a transaction carries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Generic, TypeVar

from tx_async.errors import StorageError
from tx_async.wire.records import RECORD_TYPES, Change, Delete, DropBody, Put, encode_record, type_of

Row = TypeVar("Row")


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
        self.tables: dict[str, TableChanges[bytes]] = {name: TableChanges() for name in RECORD_TYPES}
        self.bodies: TableChanges[bytes] = TableChanges()
        for change in changes:
            self._add(change)

    def _add(self, change: Change) -> None:
        match change:
            case Put(record=record, body=body):
                table = type_of(record)
                self.tables[table].put(record.key, encode_record(record))
                if body is not None:
                    assert table == "request", f"a {table} has no body"
                    self.bodies.put(record.key, body)
            case Delete(table=table, key=key):
                self.tables[table].delete(key)
                if table == "request":
                    self.bodies.delete(key)
            case DropBody(request_id=request_id):
                self.bodies.delete(request_id)


def checksum(body: bytes) -> bytes:
    """Sixteen bytes of blake2b, stored beside each body."""
    return hashlib.blake2b(body, digest_size=16).digest()


def verify(request_id: str, body: bytes, num_bytes: int, expected: bytes) -> bytes:
    """The body itself. Raises `StorageError` when it is not the one that was put."""
    if len(body) != num_bytes:
        raise StorageError(f"The journal's body of request {request_id} is damaged: {len(body)} bytes of {num_bytes}.")
    if (actual := checksum(body)) != expected:
        difference = f"checksum {actual.hex()} instead of {expected.hex()}"
        raise StorageError(f"The journal's body of request {request_id} is damaged: {difference}.")
    return body
