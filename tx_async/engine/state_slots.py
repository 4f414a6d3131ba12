"""The allocator of the slots of recurrent state, for running sequences and snapshots of prefixes.

A recurrent layer keeps a state of fixed size instead of pages. A sequence owns one slot while it runs; a snapshot is a
slot that holds the state after a known prefix, found by the prefix's key (`prefix_cache.py`). Snapshots come from
prefill alone, at the ends of its tiles, so a state that is found has the bits that computing it again would give. The
least recently used one makes room for the next; one that this quantum reads or writes does not.
"""

from __future__ import annotations

from collections import OrderedDict

from tx_async.engine.prefix_cache import PageKey

NULL_SLOT = 0
"""Unused rows write there, and nobody reads it."""


class StateSlots:
    """Every change is a function of the calls and their order: all hosts of a mesh agree without talking."""

    def __init__(self, num_sequences: int = 0, num_snapshots: int = 0):
        """Zero sequences: the model has no recurrent layers, and every caller gets the null slot."""
        self.enabled = num_sequences > 0
        #: slots that no sequence owns; a stack, so that reuse is deterministic
        self._free = list(range(num_sequences, NULL_SLOT, -1))
        self._free_snapshots = list(range(num_sequences + num_snapshots, num_sequences, -1))
        #: content -> slot, least recently used first
        self._snapshots: OrderedDict[PageKey, int] = OrderedDict()
        #: read or written by the quantum that is being planned
        self._held: set[PageKey] = set()
        #: written by that quantum: nobody may load them before its prefill has run
        self._fresh: set[PageKey] = set()

    def __repr__(self) -> str:
        return f"<StateSlots [{len(self._free)} free, {len(self._snapshots)} snapshots]>"

    def begin(self) -> None:
        """Begin to plan a quantum: what the previous one wrote can be read now."""
        self._held.clear()
        self._fresh.clear()

    def take(self) -> int:
        return self._free.pop() if self.enabled else NULL_SLOT

    def release(self, slot: int) -> None:
        if self.enabled:
            self._free.append(slot)

    def find(self, key: PageKey, after_prefill: bool = False) -> int | None:
        """The snapshot of a prefix, if there is one. after_prefill: it is read once this quantum's prefill has run."""
        slot = self._snapshots.get(key)
        if slot is None or (key in self._fresh and not after_prefill):
            return None
        self._snapshots.move_to_end(key)
        self._held.add(key)
        return slot

    def snapshot(self, key: PageKey) -> int:
        """A slot to write the state after this prefix into; the null slot where it is known or there is no room."""
        if key in self._snapshots or not (slot := self._room()):
            return NULL_SLOT
        self._snapshots[key] = slot
        self._held.add(key)
        self._fresh.add(key)
        return slot

    def _room(self) -> int:
        if self._free_snapshots:
            return self._free_snapshots.pop()
        oldest = next((key for key in self._snapshots if key not in self._held), None)
        return NULL_SLOT if oldest is None else self._snapshots.pop(oldest)

    def check(self, owned: list[int]) -> None:
        """Assert that no slot has two owners."""
        slots = [*self._free, *self._free_snapshots, *self._snapshots.values(), *(s for s in owned if s)]
        assert len(slots) == len(set(slots)), "a slot has two owners"
