"""Storage of checkpoint files in a dict, as `api/context.py` wants it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec


class MemoryFile(msgspec.Struct, frozen=True):
    key: str
    num_bytes: int


class MemoryFiles:
    """Storage of checkpoint files in a dict."""

    def __init__(self):
        self.content: dict[str, bytes] = {}

    async def list(self, prefix: str) -> list[MemoryFile]:
        keys = sorted(key for key in self.content if key.startswith(f"{prefix}/"))
        return [MemoryFile(key, len(self.content[key])) for key in keys]

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        yield self.content[key]
