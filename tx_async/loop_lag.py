"""How late the event loop is: everything that clients wait for goes through it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PERIOD_S = 0.02


async def watch_lag(late: Callable[[float], object], held: Callable[[float], object]) -> None:
    """Tell, again and again, how many seconds late a timer came, and how many of them the loop's own work can have
    caused, by its CPU time: for the rest somebody else had the machine."""
    loop = asyncio.get_running_loop()
    while True:
        due, used = loop.time() + PERIOD_S, time.thread_time()
        await asyncio.sleep(PERIOD_S)
        lag = max(0.0, loop.time() - due)
        late(lag)
        held(min(lag, time.thread_time() - used))
