"""A set of whole numbers as ranges: its cost depends on how many gaps there are, never on their width.

Clients choose the numbers, so a container with one element for each of them would be as large as a client likes.
"""

from __future__ import annotations

from bisect import bisect_right


class Ranges:
    def __init__(self):
        #: half-open [start, stop), ascending, disjoint and not touching
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __repr__(self) -> str:
        return f"<Ranges {list(self.pairs())}>"

    def __contains__(self, number: int) -> bool:
        return self.end_of(number) != number

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._starts)

    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self._starts, self._stops, strict=True))

    def end_of(self, number: int) -> int:
        """The first number from `number` on that is not in the set."""
        i = bisect_right(self._starts, number) - 1
        return max(number, self._stops[i]) if i >= 0 else number

    def add(self, start: int, stop: int) -> None:
        """Add [start, stop), which may be empty."""
        if stop <= start:
            return
        first = bisect_right(self._starts, start) - 1
        first += first < 0 or self._stops[first] < start  # else the range before reaches up to here
        last = bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def drop_below(self, number: int) -> None:
        """Forget all numbers less than `number`."""
        if not self._starts:
            return
        kept = [(max(start, number), stop) for start, stop in self.pairs() if stop > number]
        self._starts = [start for start, _ in kept]
        self._stops = [stop for _, stop in kept]
