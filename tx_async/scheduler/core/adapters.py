"""Slots on a device as a cache: which adapter is in which slot, and which one leaves when another needs its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")


class SlotCache(Generic[Key]):
    """A cache that evicts the least recently used first. It only decides: saving, loading and clearing are commands of
    its owner."""

    def __init__(self, num_slots: int):
        #: free slots, taken from the end
        self._free = list(range(num_slots))[::-1]
        #: key -> slot, least recently used first; disjoint from `_free`
        self._slots: dict[Key, int] = {}

    def __repr__(self) -> str:
        return f"<SlotCache [{len(self._slots)} used, {len(self._free)} free]>"

    def __contains__(self, key: Key) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def slot_of(self, key: Key) -> int | None:
        return self._slots.get(key)

    def slots(self) -> dict[Key, int]:
        return dict(self._slots)

    def touch(self, key: Key) -> int:
        slot = self._slots.pop(key)
        self._slots[key] = slot
        return slot

    def take(self, key: Key) -> int | None:
        """A free slot for a new key, or None."""
        assert key not in self._slots
        if not self._free:
            return None
        self._slots[key] = self._free.pop()
        return self._slots[key]

    def victim(self, may_leave: Callable[[Key], bool]) -> Key | None:
        """The least recently used key that may leave."""
        return next((key for key in self._slots if may_leave(key)), None)

    def release(self, key: Key) -> None:
        self._free.append(self._slots.pop(key))
