"""Which programs an accelerator compiles before it says that it is ready: the likeliest, by their names."""

from __future__ import annotations

from collections.abc import Sequence

AHEAD_MAX = 24
SHARES = (("decode ", 14), ("prefill ", 3), ("forward_backward ", 5), ("score ", 1), ("optim_step ", 1))
"""The most programs of each kind, in the order in which they are compiled; AHEAD_MAX is their sum."""


RARE = (" wide", " K=1024 ", " K=4097 ")
"""Parts of the names of programs that few ever ask for: large supports of stable_reinforce."""


def is_rare(name: str) -> bool:
    """Whether a program is compiled only when it is first wanted."""
    return any(mark in f"{name} " or name.endswith(mark) for mark in RARE)


def likeliest(names: Sequence[str]) -> list[str]:
    """The likeliest of an engine's programs, at most AHEAD_MAX; the others are compiled when they are first wanted.

    Training programs are those with one target per token, at the highest rank, the shortest rows first.
    """
    chosen: list[str] = []
    for kind, share in SHARES:
        of_kind = [name for name in names if name.startswith(kind)]
        if kind == "forward_backward ":
            of_kind = [name for name in of_kind if " K=1 " in name and name.endswith(_highest_rank(of_kind))]
        chosen += of_kind[-share:] if kind == "optim_step " else of_kind[:share]
    return chosen


def _highest_rank(names: Sequence[str]) -> str:
    """The highest rank, in the form in which names end: "rank=32"."""
    return f"rank={max((int(name.rpartition('=')[2]) for name in names), default=0)}"
