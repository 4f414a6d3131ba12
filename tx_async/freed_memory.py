"""Freed memory stays with the server, because the next request body needs as much again.

By default glibc maps every block of some megabytes anew and unmaps it after use, and the system clears it page by page:
3 to 15 ms for a body of 3 MB that takes 0.2 ms to copy, in one piece, while nothing else gets the interpreter.
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_MAX = 32 * 2**20
"""The most that glibc takes: larger blocks are mapped one by one."""
_OPERATORS_OWN = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep(num_bytes: int) -> bool:
    """Let each heap keep this many free bytes. Returns whether it does: an operator's own choice takes precedence, and
    other C libraries have no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _OPERATORS_OWN):
        return False
    settings = ((_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX), (_M_TRIM_THRESHOLD, min(num_bytes, 2**31 - 1)))
    return all([mallopt(name, value) == 1 for name, value in settings])
