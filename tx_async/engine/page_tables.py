"""Which pages each sequence has: a page table for each group of its layers, all from one pool (`paging.py`).

The page at index i of a table holds tokens i * page_size … of the table's layers. Pages that lie before a table's
window are given back, and the null page takes their places at the front: what is read there is masked. As part of a
known prefix they can still be found, until their room is needed. A sequence can go on from a known prefix where every
table still has all pages that the next token sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from tx_async.engine.kv_cache import NULL_PAGE
from tx_async.engine.prefix_cache import PageKey, PrefixCache

Tables = list[list[int]]


class PageTables:
    """The rules by which tables get and give back pages; the pages' owners are the sequences."""

    def __init__(self, cache: PrefixCache, windows: tuple[int, ...] = (0,)):
        """windows: of each table, 0 = its layers see everything."""
        self.cache = cache
        self.windows = windows
        self.page_size = cache.page_size

    # ---- what is known of a prefix

    def borders(self, keys: Sequence[PageKey]) -> Sequence[int]:
        """After how many of these pages a sequence can go on; ascending, from 0."""
        if not self.cache.enabled:
            return [0]
        reach = len(keys)
        for table in (table for table, window in enumerate(self.windows) if not window):
            missing = (count for count, key in enumerate(keys[:reach]) if self._known(table, key) is None)
            reach = next(missing, reach)
        borders: Sequence[int] = range(reach + 1)
        for table in (table for table, window in enumerate(self.windows) if window):
            runs = self._runs(table, keys[:reach])
            borders = [count for count in borders if runs[count] >= count - self._first_seen(table, count)]
        return borders

    def _runs(self, table: int, keys: Sequence[PageKey]) -> list[int]:
        """For each count of pages, how many known ones in a row end there."""
        runs = [0]
        for key in keys:
            runs.append(0 if self._known(table, key) is None else runs[-1] + 1)
        return runs

    def _first_seen(self, table: int, count: int) -> int:
        """The first page that the token after `count` pages sees."""
        window = self.windows[table]
        return max(0, count * self.page_size - window + 1) // self.page_size if window else 0

    def _known(self, table: int, key: PageKey) -> int | None:
        return self.cache.known(_of_table(table, key))

    def take(self, keys: Sequence[PageKey], border: int) -> Tables:
        """Tables that go on after one of the `borders`, with a reference to every page that is still seen there."""
        tables: Tables = []
        for table in range(len(self.windows)):
            first = self._first_seen(table, border)
            pages = [page for key in keys[first:border] if (page := self._known(table, key)) is not None]
            assert len(pages) == border - first, "a page that a border promised is not there"
            self.cache.retain(pages)
            tables.append([NULL_PAGE] * first + pages)
        return tables

    def tail(self, key: PageKey) -> list[int]:
        """The page in part of each table, with a reference; [] unless every table has it."""
        pages = [page for table in range(len(self.windows)) if (page := self._known(table, key)) is not None]
        if len(pages) < len(self.windows):
            return []
        self.cache.retain(pages)
        return pages

    def register(self, tables: Tables, keys: Sequence[PageKey]) -> None:
        """The first pages of every table now hold these contents."""
        for table, pages in enumerate(tables):
            for page, key in zip(pages, keys, strict=False):
                if page != NULL_PAGE:
                    self.cache.register(page, _of_table(table, key))

    def register_tail(self, tables: Tables, place: int, key: PageKey) -> None:
        """The pages at `place` now hold the end of a prompt, which fills them in part."""
        for table, pages in enumerate(tables):
            self.cache.register(pages[place], _of_table(table, key))

    # ---- getting and giving back

    def missing(self, tables: Tables, num_tokens: int, num_near: int) -> int:
        """How many pages `grow` would allocate."""
        return sum(self._missing(tables, num_tokens, num_near))

    def _missing(self, tables: Tables, num_tokens: int, num_near: int) -> list[int]:
        ends = (self._pages(num_near if window else num_tokens) for window in self.windows)
        return [max(0, end - len(pages)) for pages, end in zip(tables, ends, strict=True)]

    def grow(self, tables: Tables, num_tokens: int, num_near: int) -> bool:
        """Have pages for the first `num_tokens`, in tables with a window for the first `num_near` only; False, and
        nothing has changed, when there are not that many."""
        missing = self._missing(tables, num_tokens, num_near)
        fresh = self.cache.allocate(sum(missing))
        if fresh is None:
            return False
        for pages, count in zip(tables, missing, strict=True):
            pages.extend(fresh[:count])
            del fresh[:count]
        return True

    def reach(self, tables: Tables, spare: int) -> int:
        """How many tokens tables with a window could have pages for with `spare` more of them."""
        windowed = [len(pages) for pages, window in zip(tables, self.windows, strict=True) if window]
        return (min(windowed) + spare // len(windowed)) * self.page_size

    def still_to_come(self, tables: Tables, num_tokens: int, ahead: int) -> int:
        """How many pages more than now they will have at once until `num_tokens` are computed, `ahead` of them in one
        quantum."""
        total = self._pages(num_tokens)
        more = 0
        for pages, window in zip(tables, self.windows, strict=True):
            most = total - len(pages)
            if window:
                most = min(most, self._pages(window + ahead) + 1 - (len(pages) - num_left(pages, len(pages))))
            more += max(0, most)
        return more

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def leave(self, tables: Tables, num_computed: int, keys: Sequence[PageKey]) -> None:
        """Give back the pages that no token from position `num_computed` on sees. keys: of the first pages, those that
        are worth finding."""
        for table, window in enumerate(self.windows):
            if not window:
                continue
            pages, end = tables[table], max(0, num_computed - window + 1) // self.page_size
            first = num_left(pages, end)
            if first < end:
                for page, key in zip(pages[first:end], keys[first:end], strict=False):
                    self.cache.register(page, _of_table(table, key))
                self.cache.release(pages[first:end])
                pages[first:end] = [NULL_PAGE] * (end - first)

    def release(self, tables: Tables) -> None:
        """Give everything back. Of a prefix, the last pages of all tables go first when room is needed."""
        self.cache.release([page for column in zip_longest(*tables, fillvalue=NULL_PAGE) for page in owned([column])])


def owned(tables: Iterable[Iterable[int]]) -> list[int]:
    """The pages in tables, without the places of those that were given back."""
    return [page for pages in tables for page in pages if page != NULL_PAGE]


def _of_table(table: int, key: PageKey) -> PageKey:
    """The key of a page's contents in one table."""
    return key + bytes([table]) if table else key


def num_left(pages: list[int], end: int) -> int:
    """How many of the first `end` pages were given back: they are the first."""
    while end and pages[end - 1] != NULL_PAGE:
        end -= 1
    return end
