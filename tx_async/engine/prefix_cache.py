"""The allocator of the paged KV cache's pages, and the prefix cache that is built into it; `page_tables.py` says which
pages a sequence needs.

A page is free, in use (one or more sequences refer to it), or idle: nobody refers to it, but it holds a known prefix
and is found again by its key until its room is needed, least recently used first. A key is a hash chain over the
adapter version and all tokens up to the page's end, so equal keys mean equal contents, and no tenant can ever match
another's pages.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from tx_async.engine.kv_cache import NULL_PAGE

PageKey = bytes


class PrefixCache:
    """Every change is a function of the calls and their order: all hosts of a mesh agree without talking."""

    def __init__(self, num_pages: int, page_size: int, enabled: bool = True):
        self.page_size = page_size
        self.num_pages = num_pages
        self.enabled = enabled
        #: pages without content of value; a stack, so that reuse is deterministic
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        #: references per page; 0 for free and idle pages
        self._references = [0] * num_pages
        #: content -> page, for pages in use or idle; inverse of `_keys`
        self._pages: dict[PageKey, int] = {}
        self._keys: dict[int, list[PageKey]] = {}
        #: unreferenced pages with content, least recently used first
        self._idle: OrderedDict[int, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<PrefixCache [Pages: {self.num_used} in use, {len(self._idle)} idle, {len(self._free)} free]>"

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that somebody refers to."""
        return self.num_pages - 1 - self.num_available

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None when there are not that many. Idle pages that are handed out
        lose their content."""
        if count > self.num_available:
            return None
        while len(self._free) < count:
            page, _ = self._idle.popitem(last=False)
            for key in self._keys.pop(page):
                del self._pages[key]
            self._free.append(page)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def known(self, key: PageKey) -> int | None:
        """The page that holds this content, if there is one."""
        return self._pages.get(key)

    def retain(self, pages: Sequence[int]) -> None:
        """One more reference to each."""
        for page in pages:
            self._references[page] += 1
            self._idle.pop(page, None)

    def register(self, page: int, key: PageKey) -> None:
        """A page in use now holds the content `key`. The first page with some content stays the one that is found.

        A page may have two keys: that of a prompt's last tokens, which fill it in part, and that of the whole page.
        """
        if self.enabled and key not in self._pages:
            self._pages[key] = page
            self._keys.setdefault(page, []).append(key)

    def release(self, pages: Sequence[int]) -> None:
        """Give up one reference of each. Later pages of a prefix go first when room is needed."""
        for page in reversed(pages):
            self._references[page] -= 1
            assert self._references[page] >= 0, f"page {page} released too often"
            if self._references[page] == 0:
                self._retire(page)

    def _retire(self, page: int) -> None:
        if page in self._keys:
            self._idle[page] = None
        else:
            self._free.append(page)

    def check(self, owned: Iterable[Sequence[int]]) -> None:
        """Assert that the pages of all sequences and the cache's own books agree."""
        counts = [0] * self.num_pages
        for pages in owned:
            for page in pages:
                counts[page] += 1
        assert counts == self._references, "references and owners differ"
        assert all(self._references[page] == 0 for page in (*self._free, *self._idle))
        assert len(set(self._free) | set(self._idle)) == self.num_available
        assert sum(count > 0 for count in counts) + self.num_available == self.num_pages - 1, "a page was lost"
        assert {key: page for page, keys in self._keys.items() for key in keys} == self._pages


class PageKeys:
    """The hash chain of one sequence, extended as its tokens grow."""

    def __init__(self, adapter_version: str, page_size: int):
        self._page_size = page_size
        self._first = hashlib.blake2b(adapter_version.encode(), digest_size=16).digest()
        self._keys: list[PageKey] = []

    def upto(self, tokens: Sequence[int], num_tokens: int) -> list[PageKey]:
        """Keys of the full pages in tokens[:num_tokens]."""
        count = num_tokens // self._page_size
        for i in range(len(self._keys), count):
            self._keys.append(self._key(i, tokens[i * self._page_size : (i + 1) * self._page_size]))
        return self._keys[:count]

    def tail(self, tokens: Sequence[int], num_tokens: int) -> PageKey | None:
        """Key of the page that tokens[:num_tokens] fill in part; None when they end with a full page."""
        full = len(self.upto(tokens, num_tokens))
        tail = tokens[full * self._page_size : num_tokens]
        return self._key(full, tail) if tail else None

    def _key(self, page: int, tokens: Sequence[int]) -> PageKey:
        before = self._keys[page - 1] if page else self._first
        return hashlib.blake2b(before + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()
