"""How a worker process gets memory from the system. The C library reads these settings once, when the process starts.

On a CPU, every training micro-batch needs some hundred megabytes of temporary arrays. By default, glibc maps each anew
and unmaps it after use, so the system clears it page by page, which takes a tenth to a fifth of a step.

- hugetlb: pages of 2 MiB, fewer to clear and to look up; a decode step, which reads all weights, gains from them, too.
- mmap_max, trim_threshold: freed memory stays with the process and is used again. So a worker keeps the memory that
  its largest programs have needed, because it would need it again.
- arena_max: one heap for all threads. With more, large arrays are mapped in spite of mmap_max.
- top_pad: the heap grows in steps of 64 MiB.

Other C libraries ignore these settings.
"""

from __future__ import annotations

_TUNABLES = {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 2**36, "arena_max": 1, "top_pad": 2**26}

ENVIRONMENT = {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items())}
"""The environment to start a process with. An operator's own choice takes precedence."""
