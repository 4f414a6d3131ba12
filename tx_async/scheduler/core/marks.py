"""Marks the journal's record that is being replayed, in memory that outlives the process, so that the next process
knows at which record this one died.

A record that ends the process would end every process after it. The second death at the same step of the same record
sets it aside (`recovery.py`): one death may be chance, because somebody killed the server just then. A mark is written
in a microsecond, with no I/O: the kernel keeps what was written into mapped memory, whatever ends the process.
"""

from __future__ import annotations

from collections.abc import Generator, MutableSequence
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from tx_async.errors import TxError

PLACE_BYTES = 512
NUM_BYTES = 2 * PLACE_BYTES
DEATHS_MAX = 2
"""This many deaths in a row at one step of a record are not chance."""

Stage = Literal["restore", "read", "run"]
"""The steps of a replay: a record takes its place in its run, its body is decoded, it becomes commands."""


class ReplayMarks:
    """Two places: the record being replayed now, and the record at which a process has died, with the number of deaths.

    `memory` is read once, here, for the marks that the previous process has left.
    """

    def __init__(self, memory: MutableSequence[int] | Any = None):
        self._memory = bytearray(NUM_BYTES) if memory is None else memory
        #: `stage request_id` of the record at which processes have died, and how many in a row
        self._suspect, self._deaths = _parse(self._get(1))
        if died_of := self._get(0):
            self._deaths = self._deaths + 1 if died_of == self._suspect else 1
            self._suspect = died_of
            self._put(1, f"{self._deaths} {self._suspect}")
            self._put(0, "")

    @property
    def poisoned(self) -> str:
        """The request that must not be replayed again; "" while there is none."""
        return self._suspect.partition(" ")[2] if self._deaths >= DEATHS_MAX else ""

    @property
    def may_take_its_place(self) -> bool:
        """Whether the poisoned record did no harm when it was only put in its run's order."""
        return not self._suspect.startswith("restore ")

    @contextmanager
    def of(self, stage: Stage, request_id: str) -> Generator[None]:
        """Mark the record while the body runs. An error that is no answer to anybody leaves the mark: it ends the
        process."""
        outer, mark = self._get(0), f"{stage} {request_id}"
        self._put(0, mark)
        try:
            yield
        except (TxError, msgspec.DecodeError):
            self._survived(mark, outer)
            raise
        self._survived(mark, outer)

    def _survived(self, mark: str, outer: str) -> None:
        self._put(0, outer)
        if mark == self._suspect and not self.poisoned:
            self._suspect, self._deaths = "", 0
            self._put(1, "")

    def _get(self, place: int) -> str:
        begin = place * PLACE_BYTES
        return bytes(self._memory[begin : begin + PLACE_BYTES]).partition(b"\0")[0].decode("utf-8", "replace")

    def _put(self, place: int, text: str) -> None:
        """A half-written mark names no existing record, and does no harm."""
        begin, data = place * PLACE_BYTES, text.encode()[: PLACE_BYTES - 1]
        self._memory[begin : begin + len(data) + 1] = data + b"\0"


def _parse(text: str) -> tuple[str, int]:
    deaths, _, suspect = text.partition(" ")
    return (suspect, int(deaths)) if deaths.isdecimal() else ("", 0)
