"""A worker process's pulse: a pipe to its supervisor, so that a process that hangs does not hang for ever.

The server gives up a silent worker when its lease ends, but cannot end it: a process that was stopped (SIGSTOP), or
that never lets go of Python's lock, reads no message. Its supervisor can end it, on whatever host that is.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable

PULSE_VARIABLE = "TX_WORKER_PULSE_FD"
FIRST_LEASE_S = 60.0
"""The lease to assume until the server has said what it is."""
READ_BYTES = 1 << 16


def beat(lease_s: float) -> None:
    """Tell the supervisor that this process lives, and for how long to believe it. Does nothing without a
    supervisor."""
    descriptor = os.environ.get(PULSE_VARIABLE)
    # A full pipe has a reader that was stopped, a broken one has none: neither is our business.
    with contextlib.suppress(OSError):
        if descriptor:
            os.write(int(descriptor), b"%d\n" % round(1000 * (lease_s if math.isfinite(lease_s) else FIRST_LEASE_S)))


class Pulse:
    """The supervisor's end for one process: the process gets `descriptor`, the supervisor calls `silence` now and
    then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._reader, self.descriptor = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self.descriptor, False)
        self._lease_s = FIRST_LEASE_S
        self._last_beat = self._last_asked = clock()

    def close_writer(self) -> None:
        """Close our copy of the writing end: the process has its own now."""
        os.close(self.descriptor)

    def close(self) -> None:
        os.close(self._reader)

    def silence(self) -> float | None:
        """Seconds without a beat, once they are more than a lease; else None.

        If nobody asked for half a lease, this process itself hung, and the worker gets the benefit of the doubt.
        """
        now = self._clock()
        if self._read() or now - self._last_asked > self._lease_s / 2:
            self._last_beat = now
        self._last_asked = now
        silent_s = now - self._last_beat
        return silent_s if silent_s > self._lease_s else None

    def _read(self) -> bool:
        try:
            beats = os.read(self._reader, READ_BYTES).split(b"\n")
        except BlockingIOError:
            return False
        if len(beats) < 2:  # the other end is closed: the process is ending
            return False
        self._lease_s = int(beats[-2]) / 1000
        return True
