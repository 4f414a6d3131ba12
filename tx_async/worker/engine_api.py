"""What an engine implements. With `dispatch/dealer.py` and `schemas/` this is all that a third-party engine needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from tx_async.errors import EngineGone
from tx_async.wire.worker import Command, EngineInfo, Heartbeat, Result

Reply = tuple[Result, list[np.ndarray]]
"""A result and its tensors, in the order that the result's docstring states."""

Pending = Callable[[], Reply]
"""Waits for a command's outcome. Raises the error that made it fail: a `TxError` fails that command alone, any other is
fatal. It is called once, on another thread, in command order except for `SaveAdapter`, whose files may become durable
later."""

ReportProgress = Callable[[str, float, float], None]
"""(stage, done, total)."""


class Engine(Protocol):
    """The device and everything on it. Commands arrive on one thread, one at a time, in stream order."""

    def info(self) -> EngineInfo: ...

    def execute(self, command: Command, tensors: Sequence[np.ndarray]) -> Pending:
        """Issue a command: change host-side state now, leave the device running, return how to wait for it.

        `tensors` are views that are valid only during this call: keep nothing of them.
        """
        ...

    def vitals(self) -> Heartbeat:
        """What each heartbeat reports; called on the heartbeat's thread."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class WatchedEngine(Engine, Protocol):
    """An engine that lives elsewhere and may go away. Then its pendings raise `EngineGone`, which answers nothing."""

    def watch(self, on_gone: Callable[[EngineGone], None]) -> None:
        """From now on `on_gone` is called, once and on any thread, when it is gone."""
        ...
