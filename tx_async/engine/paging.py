"""How the layers of a model share the pages of the KV cache, and how much of a sequence has pages at once.

Every page holds `page_size` tokens of `page_layers` layers, so any page serves any layers, and one pool with one
allocator is enough. Layers that see equally far are a group (`Keeps.window`); a sequence has a page table for each
`page_layers` layers of a group, and of a group with a window the pages that fell out of it are free again. Models whose
layers all see equally far have one table.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from tx_async.engine.platform import Platform
from tx_async.wire.worker import EngineConfig

TABLES_MAX = 8
"""The most page tables of a sequence, unless there are more kinds of windows: every quantum uploads them all."""


@dataclass(frozen=True)
class Paging:
    windows: tuple[int, ...] = (0,)
    """For each page table, how many tokens its layers see; 0 = all. Ordered from the widest to the narrowest."""
    page_layers: int = 1
    """How many layers a page has room for."""

    @classmethod
    def of(cls, layers: Mapping[int, int]) -> Paging:
        """layers: window -> how many layers have it.

        Where groups differ in size, some pages have room that no layer uses: as little as possible in the groups that
        see farthest, which hold the most pages.
        """
        if not layers:
            return cls()
        groups = sorted(layers.items(), key=lambda group: -(group[0] or math.inf))
        tables_max = max(TABLES_MAX, len(groups))

        def num_tables(size: int) -> list[int]:
            return [-(-count // size) for _, count in groups]

        sizes = [size for size in range(1, max(layers.values()) + 1) if sum(num_tables(size)) <= tables_max]
        size = min(sizes, key=lambda size: ([size * count for count in num_tables(size)], -size))
        counts = zip(groups, num_tables(size), strict=True)
        return cls(tuple(window for (window, _), count in counts for _ in range(count)), size)

    @property
    def num_tables(self) -> int:
        return len(self.windows)

    def tables_of(self, window: int) -> range:
        """The tables of the layers that see so many tokens, in the order of these layers."""
        first = self.windows.index(window)
        return range(first, first + self.windows.count(window))

    def at_once(self, num_tokens: int, ahead: int) -> list[int]:
        """For each table, how many tokens of one sequence have pages at once, at most. ahead: what is computed in one
        quantum, and a page, because windows begin anywhere in theirs."""
        return [min(num_tokens, window + ahead) if window else num_tokens for window in self.windows]

    def cache_for(self, count: int, num_tokens: int, ahead: int) -> int:
        """Tokens of a cache in which `count` sequences of that length have room at once."""
        return -(-count * sum(self.at_once(num_tokens, ahead)) // self.num_tables)

    def longest(self, cache_tokens: int, ahead: int, limit: int) -> int:
        """The longest sequence, up to `limit`, in a cache that holds `cache_tokens` in every table."""
        room = cache_tokens * self.num_tables
        return bisect_right(range(1, limit + 1), room, key=lambda length: sum(self.at_once(length, ahead)))


ONE_TABLE = Paging()


def tokens_ahead(config: EngineConfig, platform: Platform) -> int:
    """`ahead` of `Paging.at_once`."""
    chunk, steps = config.prefill_chunk_tokens or platform.prefill_tokens, config.decode_steps or platform.decode_steps
    return chunk + steps + config.kv_page_size
