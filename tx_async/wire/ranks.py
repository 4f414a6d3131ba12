"""Classes of LoRA ranks: a slot's arrays have the rank of a class, and an adapter is computed at that of its own class.

An adapter's class is the smallest that holds its rank, whatever the slots hold beside it: so neither neighbours nor
wider slots change how its sums are formed. Slots begin at `FIRST_RANK`; when an adapter of a higher class is wanted,
the worker starts again with wider ones.
"""

from __future__ import annotations

FIRST_RANK = 32
"""The rank of slots until somebody asks for more."""


def rank_classes(max_rank: int) -> tuple[int, ...]:
    """Ascending: 8, 32, 64, 128, … below `max_rank`, then `max_rank` itself."""
    classes: list[int] = []
    size = 8
    while size < max_rank:
        classes.append(size)
        size = FIRST_RANK if size == 8 else 2 * size
    return (*classes, max_rank)


def shared_classes(max_rank: int) -> tuple[int, ...]:
    """The classes of programs for rows of several adapters: up to the first rank they share one."""
    return tuple(rank for rank in rank_classes(max_rank) if rank >= min(FIRST_RANK, max_rank))


def slot_rank(max_rank: int, wanted: int = 0) -> int:
    """The rank of slots for adapters up to `wanted`, which is at most `max_rank`."""
    return class_of(max(wanted, min(FIRST_RANK, max_rank)), rank_classes(max_rank))


def class_of(rank: int, classes: tuple[int, ...]) -> int:
    """The smallest of `classes` (ascending) that holds `rank`; the largest for ranks beyond it."""
    return next((size for size in classes if size >= rank), classes[-1])
