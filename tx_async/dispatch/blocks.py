"""How tensors travel: in an arena when both ends share a host and the arena has room, else in a frame of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tx_async.dispatch.frames import IN_FRAME, SMALL_BLOCK_BYTES, Block, MalformedMessage, read_block
from tx_async.dispatch.groups import Group, Member
from tx_async.wire.tensors import TensorSpec


class BlockTransport:
    """Chooses the way that a block of tensors travels, and counts what went which way."""

    def __init__(self):
        self.counts = {"shared_bytes": 0, "frame_bytes": 0, "arena_full": 0}

    def write_shared(
        self, group: Group, tensors: Sequence[np.ndarray], offsets: Sequence[int], num_bytes: int
    ) -> Block | None:
        """Write the block into the group's inbox; None when it must go as a frame."""
        if group.inbox is None or num_bytes < SMALL_BLOCK_BYTES:
            return None
        block = group.inbox.write(tensors, offsets, num_bytes)
        self.counts["shared_bytes" if block else "arena_full"] += num_bytes if block else 1
        return block

    def in_frame(self, num_bytes: int) -> Block:
        self.counts["frame_bytes"] += num_bytes
        return Block(IN_FRAME, num_bytes)

    def read(
        self, member: Member, specs: Sequence[TensorSpec], block: Block | None, payload: bytes | memoryview | None
    ) -> list[np.ndarray]:
        """Views of the tensors that a process has sent. Raises `MalformedMessage` when they are not there."""
        if not specs:
            return []
        if block is None:
            raise MalformedMessage("tensors without a block")
        self.counts["frame_bytes" if block.offset == IN_FRAME else "shared_bytes"] += block.num_bytes
        if block.offset == IN_FRAME:
            if payload is None:
                raise MalformedMessage("tensors without a frame")
            return read_block(payload, block, specs)
        if member.outbox is None:
            raise MalformedMessage("tensors in an arena that does not exist")
        return member.outbox.read(block, specs)
