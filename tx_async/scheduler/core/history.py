"""The history of training runs: a row of numbers for each optimizer step, thinned with age.

A run's rows lie in blocks, so that a step writes a small record however long the history is. Everything here but
`Histories` is a pure function over rows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat

import msgspec

from tx_async.wire.records import Change, Delete, HistoryRecord, Put

HistoryRow = dict[str, float]
"""The name of a number -> its value. `index` counts the run's optimizer steps from 0."""
INDEX = "index"
GATHERING = 0
"""The number of the record that holds the next step's row so far."""
BLOCK_ROWS = 32


def encode_rows(model_id: str, number: int, rows: Sequence[HistoryRow]) -> HistoryRecord:
    columns = tuple(dict.fromkeys(chain.from_iterable(rows)))
    values = b"".join(_encode(columns, row) for row in rows)
    return HistoryRecord(model_id=model_id, number=number, columns=columns, values=values)


def decode_rows(record: HistoryRecord) -> list[HistoryRow]:
    width = _width(record)
    return [_decode(record, place) for place in range(0, len(record.values), width)]


def newest_of(record: HistoryRecord) -> HistoryRow:
    """Only the last row."""
    return _decode(record, len(record.values) - _width(record))


def num_rows(record: HistoryRecord) -> int:
    return len(record.values) // _width(record)


def with_row(record: HistoryRecord, row: HistoryRow) -> HistoryRecord:
    """The record with one more row. Steps mostly report the same numbers, and then the other rows stay as they are."""
    if row.keys() <= set(record.columns):
        return msgspec.structs.replace(record, values=record.values + _encode(record.columns, row))
    return encode_rows(record.model_id, record.number, [*decode_rows(record), row])


def _width(record: HistoryRecord) -> int:
    """Bytes of one row."""
    return 8 * max(1, len(record.columns))


def _encode(columns: Sequence[str], row: HistoryRow) -> bytes:
    return struct.pack(f"<{len(columns)}d", *map(row.get, columns, repeat(math.nan)))


def _decode(record: HistoryRecord, place: int) -> HistoryRow:
    """The row that begins at this byte."""
    values = struct.unpack_from(f"<{len(record.columns)}d", record.values, place)
    return {name: value for name, value in zip(record.columns, values, strict=True) if value == value}


def kept(indexes: Sequence[int], steps_max: int) -> list[int]:
    """Which of the ascending `indexes` stay, at most `steps_max`. The newest half stays whole. Of older steps every
    second stays, or every fourth, …, so steps that were thinned once are thinned no further until their neighbours are
    as thin; the first step always stays."""
    if len(indexes) <= steps_max:
        return list(indexes)
    num_whole = steps_max // 2
    older, whole = indexes[: len(indexes) - num_whole], indexes[len(indexes) - num_whole :]
    stride = 1
    while len(older) > steps_max - num_whole:
        stride *= 2
        older = [index for index in older if index % stride == 0]
    return [*older, *whole]


def in_blocks(model_id: str, rows: Sequence[HistoryRow]) -> list[HistoryRecord]:
    return [
        encode_rows(model_id, 1 + start // BLOCK_ROWS, rows[start : start + BLOCK_ROWS])
        for start in range(0, len(rows), BLOCK_ROWS)
    ]


def gathered(row: Mapping[str, float], batch: Mapping[str, float], positions: int) -> HistoryRow:
    """A row with one more forward_backward. The part after a name's colon says how it adds up; a mean is weighted by
    the batch's number of sampled `positions`, as in the batch itself."""
    known = row.get("sampled_tokens", 0.0)
    total = {**row, "sampled_tokens": known + positions}
    for name, value in batch.items():
        before = row.get(name)
        if before is None:
            total[name] = value
        elif name.endswith(":mean"):
            total[name] = (before * known + value * positions) / (known + positions) if known + positions else value
        elif name.endswith(":max"):
            total[name] = max(before, value)
        elif name.endswith(":min"):
            total[name] = min(before, value)
        elif name == "started_at":
            total[name] = before
        else:
            total[name] = before + value
    return total


class Histories:
    """The histories of all runs. The catalog owns them, and changes them with the records that it is told."""

    def __init__(self) -> None:
        #: model_id -> number of a block -> its record
        self._blocks: dict[str, dict[int, HistoryRecord]] = {}
        self.num_bytes = 0

    def __repr__(self) -> str:
        return f"<Histories [{len(self._blocks)} runs, {self.num_bytes} bytes]>"

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def put(self, record: HistoryRecord) -> None:
        blocks = self._blocks.setdefault(record.model_id, {})
        before = blocks.get(record.number)
        blocks[record.number] = record
        self.num_bytes += len(record.values) - (len(before.values) if before else 0)

    def pop(self, key: str) -> None:
        model_id, _, number = key.rpartition(" ")
        record = self._blocks.get(model_id, {}).pop(int(number), None)
        if record is None:
            return
        self.num_bytes -= len(record.values)
        if not self._blocks[model_id]:
            del self._blocks[model_id]

    def rows(self, model_id: str, since: int = 0) -> list[HistoryRow]:
        """The rows from this `index` on, oldest first; blocks with only older rows are skipped."""
        blocks = self._blocks.get(model_id, {})
        found: list[list[HistoryRow]] = []
        for number in sorted(blocks, reverse=True):
            rows = decode_rows(blocks[number]) if number != GATHERING else []
            found.append([row for row in rows if row[INDEX] >= since])
            if rows and rows[0][INDEX] < since:
                break
        return [row for rows in reversed(found) for row in rows]

    def gathering(self, model_id: str) -> HistoryRow:
        """The next step's row so far."""
        record = self._blocks.get(model_id, {}).get(GATHERING)
        return newest_of(record) if record else {}

    def newest_row(self, model_id: str) -> HistoryRow | None:
        newest = self._newest_block(model_id)
        return newest_of(newest) if newest else None

    def next_index(self, model_id: str) -> float:
        """The `index` of the step that comes next."""
        newest = self._newest_block(model_id)
        if newest is None:
            return 0.0
        place = len(newest.values) - _width(newest) + 8 * newest.columns.index(INDEX)
        return struct.unpack_from("<d", newest.values, place)[0] + 1

    def _newest_block(self, model_id: str) -> HistoryRecord | None:
        blocks = self._blocks.get(model_id, {})
        newest = max(blocks, default=GATHERING)
        return blocks[newest] if newest != GATHERING else None

    # ---- which changes an update makes

    def gather(self, model_id: str, row: HistoryRow) -> tuple[Change, ...]:
        return (Put(encode_rows(model_id, GATHERING, [row])),)

    def drop_gathered(self, model_id: str) -> tuple[Change, ...]:
        record = self._blocks.get(model_id, {}).get(GATHERING)
        return (Delete("history", record.key),) if record else ()

    def append(self, model_id: str, row: HistoryRow, steps_max: int) -> tuple[Change, ...]:
        """A step has ended: its row joins the newest block, and all blocks are rewritten when there are too many."""
        newest = self._newest_block(model_id)
        if newest is not None and num_rows(newest) < BLOCK_ROWS:
            return (Put(with_row(newest, row)), *self.drop_gathered(model_id))
        number = newest.number + 1 if newest else 1
        thinned = self._thin(model_id, steps_max) if newest else ()
        new_block = Put(encode_rows(model_id, number, [row]))
        changes = self._renumbered(model_id, thinned, row) if thinned else (new_block,)
        return (*changes, *self.drop_gathered(model_id))

    def _thin(self, model_id: str, steps_max: int) -> list[HistoryRow]:
        """The rows that stay, when there are too many; else nothing."""
        rows = self.rows(model_id)
        if len(rows) < steps_max:
            return []
        stay = set(kept([int(row[INDEX]) for row in rows], max(2, steps_max - steps_max // 4)))
        return [row for row in rows if int(row[INDEX]) in stay]

    def _renumbered(self, model_id: str, rows: Sequence[HistoryRow], row: HistoryRow) -> tuple[Change, ...]:
        records = in_blocks(model_id, [*rows, row])
        gone = [old.key for number, old in self._blocks[model_id].items() if number > len(records)]
        return (*map(Put, records), *(Delete("history", key) for key in gone))

    def forget(self, model_id: str) -> tuple[Change, ...]:
        return tuple(Delete("history", record.key) for record in self._blocks.get(model_id, {}).values())
