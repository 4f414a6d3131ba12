"""Which record of the journal is being worked on while it is replayed: in memory that outlives the process, so that the
next life knows at which one it died.

A record that ends the process would end every life after it. The second death at the same step of the same record sets
it aside (`recovery.py`). One death may be chance (somebody killed the server just then), and a mark is written in a
microsecond, with no I/O: the kernel keeps what was written into mapped memory, whatever ends the process.
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
"""So many deaths in a row at one step of a record are no chance."""

Stage = Literal["restore", "read", "run"]
"""What is done with a record: it takes its place in its run; its body is decoded; it becomes commands."""


class ReplayMarks:
    """Two places: what is being worked on now, and what a life has died of, with the number of deaths.

    `memory` is read here once, for what the life before has left.
    """

    def __init__(self, memory: MutableSequence[int] | Any = None):
        self._memory = bytearray(NUM_BYTES) if memory is None else memory
        #: `stage request_id` of the record that lives have died of, and how many in a row
        self._suspect, self._deaths = _parse(self._get(1))
        if died_of := self._get(0):
            self._deaths = self._deaths + 1 if died_of == self._suspect else 1
            self._suspect = died_of
            self._put(1, f"{self._deaths} {self._suspect}")
            self._put(0, "")

    @property
    def poisoned(self) -> str:
        """The request that is not to be touched again; "" while there is none."""
        return self._suspect.partition(" ")[2] if self._deaths >= DEATHS_MAX else ""

    @property
    def may_take_its_place(self) -> bool:
        """The poisoned record did no harm where it was only put in its run's order."""
        return not self._suspect.startswith("restore ")

    @contextmanager
    def of(self, stage: Stage, request_id: str) -> Generator[None]:
        """The body does this to the record. An error that is nobody's answer leaves the mark: it ends the process."""
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
        """A half-written mark names nothing that is there, and does no harm."""
        begin, data = place * PLACE_BYTES, text.encode()[: PLACE_BYTES - 1]
        self._memory[begin : begin + len(data) + 1] = data + b"\0"


def _parse(text: str) -> tuple[str, int]:
    deaths, _, suspect = text.partition(" ")
    return (suspect, int(deaths)) if deaths.isdecimal() else ("", 0)
