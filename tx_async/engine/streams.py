"""A second stream of device work, beside that of the thread that executes commands.

XLA's CPU client runs the programs that one thread dispatches one after another, and those of two threads side by side.
So on a CPU sampling gets a thread of its own: a decode step never waits for the end of a training micro-batch.
Accelerators run programs in order whichever thread dispatches them, and on a mesh every process must dispatch in one
order: there `Stream` adds nothing and is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol


class Stream(Protocol):
    """Where device work is dispatched."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function`, which dispatches, on this stream; -> what it returns."""
        ...

    def close(self) -> None: ...


class SameStream:
    """Runs on the caller's own thread."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def close(self) -> None:
        pass


class OwnStream:
    """Runs on a thread that does nothing else."""

    def __init__(self, name: str):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._thread.submit(function, *arguments).result()

    def close(self) -> None:
        self._thread.shutdown()
