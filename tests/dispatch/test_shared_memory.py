import errno
import os

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tx_async.dispatch.frames import ALIGNMENT, layout, specs_of
from tx_async.dispatch.shared_memory import Allocator, ArenaReader, ArenaWriter, create_arena

SIZE = 4096


class AllocatorAgainstAMap(RuleBasedStateMachine):
    """The model is a list with the owner of every 64-byte cell."""

    def __init__(self):
        super().__init__()
        self.allocator = Allocator(SIZE)
        self.cells: list[int | None] = [None] * (SIZE // ALIGNMENT)
        self.starts: list[int] = []

    @rule(num_bytes=st.integers(0, SIZE + 100))
    def allocate(self, num_bytes):
        length = max(1, -(-num_bytes // ALIGNMENT))
        start = self.allocator.allocate(num_bytes)
        if start is None:
            text = "".join("." if cell is None else "x" for cell in self.cells)
            assert "." * length not in text
            return
        first = start // ALIGNMENT
        assert start % ALIGNMENT == 0 and all(cell is None for cell in self.cells[first : first + length])
        assert first + length <= len(self.cells)
        self.cells[first : first + length] = [start] * length
        self.starts.append(start)

    @precondition(lambda self: self.starts)
    @rule(data=st.data())
    def free(self, data):
        start = self.starts.pop(data.draw(st.integers(0, len(self.starts) - 1)))
        assert self.allocator.free(start)
        self.cells = [None if cell == start else cell for cell in self.cells]

    @rule(offset=st.integers(-100, SIZE + 100))
    def free_what_is_not_used(self, offset):
        if offset not in self.starts:
            assert not self.allocator.free(offset)

    @invariant()
    def used_bytes_are_right(self):
        assert self.allocator.used_bytes == ALIGNMENT * sum(cell is not None for cell in self.cells)


TestAllocator = AllocatorAgainstAMap.TestCase


@pytest.fixture
def arena(tmp_path):
    path = tmp_path / "arena"
    create_arena(path, 1 << 20)
    writer, reader = ArenaWriter(path), ArenaReader(path)
    yield writer, reader
    writer.close()
    reader.close()


def write(writer, *tensors):
    return writer.write(tensors, *layout(specs_of(tensors)))


def test_what_one_end_writes_the_other_reads(arena):
    writer, reader = arena
    tensors = [np.arange(1000, dtype=np.float32), np.eye(3, dtype=np.int32)]
    blocks = [write(writer, *tensors) for _ in range(3)]
    assert len({block.offset for block in blocks}) == 3
    for block in blocks:
        for before, after in zip(tensors, reader.read(block, specs_of(tensors)), strict=True):
            np.testing.assert_array_equal(before, after)


def test_a_full_arena_says_so_and_recovers(arena):
    writer, _ = arena
    half = np.zeros(500_000, np.uint8).view(np.bool_)
    first, second = write(writer, half), write(writer, half)
    assert write(writer, half) is None
    writer.free(first.offset)
    assert write(writer, half) == first
    assert writer.free(second.offset) and not writer.free(second.offset)


def test_a_machine_without_memory_is_a_full_arena(arena, monkeypatch):
    """Writing to pages that the system cannot provide would end the process with SIGBUS."""
    writer, _ = arena

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    assert write(writer, np.zeros(10, np.float32)) is None
    assert writer.used_bytes == 0


def test_views_outlive_the_arena(arena):
    writer, reader = arena
    block = write(writer, np.arange(5, dtype=np.int64))
    [view] = reader.read(block, specs_of([np.arange(5, dtype=np.int64)]))
    writer.close()
    reader.close()
    assert view.tolist() == [0, 1, 2, 3, 4]


def test_a_closed_arena_takes_nothing(arena):
    writer, _ = arena
    writer.close()
    assert write(writer, np.zeros(3, np.float32)) is None


def test_an_arena_is_private(tmp_path):
    create_arena(tmp_path / "arena", 4096)
    assert (tmp_path / "arena").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        create_arena(tmp_path / "arena", 4096)
