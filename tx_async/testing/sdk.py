"""What tests of the real SDK have to know of its habits."""

from __future__ import annotations

import gc
import time
from asyncio import BaseTransport

from tinker.lib.internal_client_holder import InternalClientHolder

CLOSING_S = 6.0
UNCLOSED = "ignore:unclosed:ResourceWarning"
"""A filter for pytest: the SDK leaves sockets to the garbage collector."""


def collect_connections() -> None:
    """The SDK closes a client's connections some seconds after the client, on a thread of its own, or leaves them to
    the garbage collector when their server has died. Whoever shares the process with such tests would meet the warnings
    about them: wait until they are gone, where those warnings are expected.

    :raises AssertionError: a client was never closed: its heartbeats would go on, and fail, as long as the process
    """
    gc.collect()
    left = [holder for holder in gc.get_objects() if type(holder) is InternalClientHolder and not holder._closed]
    assert not left, f"{len(left)} clients of the SDK were not closed"
    deadline = time.monotonic() + CLOSING_S
    while _has_connections() and time.monotonic() < deadline:
        time.sleep(0.5)
        gc.collect()


def _has_connections() -> bool:
    return any(issubclass(type(thing), BaseTransport) for thing in gc.get_objects())
