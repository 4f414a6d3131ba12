"""How a worker process gets memory from the system. The C library reads it once, when the process starts.

Every training micro-batch of a CPU needs some hundred megabytes of temporary arrays. As glibc is by itself, each is
mapped anew and unmapped after its use, so the system clears it page by page: a tenth to a fifth of a step.

- hugetlb: pages of 2 MiB, fewer to clear and to look up; a decode step, which reads all weights, gains by them too.
- mmap_max, trim_threshold: what is freed stays with the process and is used again. So a worker keeps the memory that
  its largest programs have needed, as it would need it again.
- arena_max: one heap for all threads. With more, large arrays are mapped in spite of mmap_max.
- top_pad: the heap grows in steps of 64 MiB.

Another C library ignores it.
"""

from __future__ import annotations

_TUNABLES = {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 2**36, "arena_max": 1, "top_pad": 2**26}

ENVIRONMENT = {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items())}
"""For the start of a process. An operator's own choice comes before it."""
