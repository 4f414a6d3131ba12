"""Arenas: files in shared memory through which tensors pass between processes of one host.

One arena has one writer and one direction. The writer alone decides which parts are in use (`Allocator`); a reader gets
offsets in message headers, checks them, and says when it has finished reading. The server creates the files, inside its
`RuntimeDirectory`, so that there is one place to clean up.

Allocation is first fit, not a ring: a block that is held for long stands in nobody's way, and the same low pages are
used again and again, which keeps them in the cache and the arena's real memory as small as its high-water mark. An
arena that is full, or a machine without the memory for it, is no error: `write` returns None, and the tensors travel as
a frame.
"""

from __future__ import annotations

import bisect
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tx_async.dispatch.frames import ALIGNMENT, Block, read_block, write_block
from tx_async.wire.tensors import TensorSpec

GROWTH_BYTES = 4 * 2**20


class Allocator:
    """Which parts of `size` bytes are in use. Blocks are few (commands in flight), so a sorted list serves best."""

    def __init__(self, size: int):
        self.size = size
        #: (offset, end) of every block in use, ascending, never overlapping
        self._blocks: list[tuple[int, int]] = []
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def allocate(self, num_bytes: int) -> int | None:
        """The offset of a free block, a multiple of `ALIGNMENT`; None when no gap is large enough."""
        length = max(ALIGNMENT, -(-num_bytes // ALIGNMENT) * ALIGNMENT)
        start = 0
        for index, (offset, end) in enumerate([*self._blocks, (self.size, self.size)]):
            if offset - start >= length:
                self._blocks.insert(index, (start, start + length))
                self.used_bytes += length
                return start
            start = end
        return None

    def free(self, offset: int) -> bool:
        """Free the block at `offset`. False when no block begins there."""
        index = bisect.bisect_left(self._blocks, (offset, 0))
        if index == len(self._blocks) or self._blocks[index][0] != offset:
            return False
        start, end = self._blocks.pop(index)
        self.used_bytes -= end - start
        return True


def create_arena(path: Path, size: int) -> None:
    """Create a sparse file, private to this user, which takes memory only where it is written."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)


class ArenaWriter:
    """The writing end. `write` and `free` may be called from different threads."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        size = os.fstat(self._file).st_size
        #: None when closed. Its own `close` is never called: numpy's views would not prevent it, and then read freed
        #: memory
        self._map: mmap.mmap | None = mmap.mmap(self._file, size)
        self._allocator = Allocator(size)
        #: bytes from the start that the system has reserved for us; writing beyond them could end in SIGBUS
        self._reserved_bytes = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        used = f"{self._allocator.used_bytes} of {self._allocator.size} used, {self._reserved_bytes} reserved"
        return f"<ArenaWriter [Blocks: {len(self._allocator)} | Bytes: {used}]>"

    @property
    def used_bytes(self) -> int:
        return self._allocator.used_bytes

    def write(self, arrays: Sequence[np.ndarray], offsets: Sequence[int], num_bytes: int) -> Block | None:
        """Copy a block of tensors in. None when there is no room: send it as a frame."""
        with self._lock:
            mapping = self._map
            start = self._allocator.allocate(num_bytes) if mapping else None
            if start is not None and not self._reserve(start + num_bytes):
                self._allocator.free(start)
                start = None
        if start is None:
            return None
        write_block(mapping, start, arrays, offsets)
        return Block(start, num_bytes)

    def free(self, offset: int) -> bool:
        with self._lock:
            return self._allocator.free(offset)

    def _reserve(self, end: int) -> bool:
        if end <= self._reserved_bytes:
            return True
        end = min(self._allocator.size, -(-end // GROWTH_BYTES) * GROWTH_BYTES)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._file, self._reserved_bytes, end - self._reserved_bytes)
            except OSError:
                return False
        self._reserved_bytes = end
        return True

    def close(self) -> None:
        with self._lock:
            if self._map is None:
                return
            os.close(self._file)
            self._map = None


class ArenaReader:
    """The reading end."""

    def __init__(self, path: str | Path):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            self._map: mmap.mmap | None = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)

    def read(self, block: Block, specs: Sequence[TensorSpec]) -> list[np.ndarray]:
        """Views that stay readable as long as they exist, and stay meaningful until the block is released."""
        assert self._map is not None, "the arena is closed"
        return read_block(self._map, block, specs)

    def close(self) -> None:
        """Close the reading end. Views that are still held keep the memory, which is freed with the last of them."""
        self._map = None
