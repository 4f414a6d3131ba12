"""Whether the external engine is well, and still the same engine as before.

A worker asks when something has failed, to tell the request's fault from the engine's, and every few seconds in any
case: an engine that is stuck closes no connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection

import numpy as np
from msgspec import Struct

from tx_async.worker.dialect import Dialect, EncodedPrompt, RejectedByEngine, Served, Unreachable
from tx_async.worker.external_attach import probe_spec


class HealthSettings(Struct, frozen=True, kw_only=True):
    """When an engine that says nothing is taken for gone."""

    interval_s: float = 2.0
    silence_s: float = 20.0
    """Time without an answer to a question that costs nothing."""
    stall_s: float = 120.0
    """Time with sequences running and no token computed."""
    stall_uncounted_s: float = 900.0
    """Time without the end of a sequence, for an engine that does not count its tokens."""


class EngineHealth:
    """Every answer is a reason in words; "" while all is well."""

    def __init__(self, dialect: Dialect, served: Served, settings: HealthSettings):
        self.dialect, self.served, self.settings = dialect, served, settings

    async def why_unwell(self, adapters: Collection[str]) -> str:
        """Check that the engine answers, serves what it served before, and has these adapters."""
        return await self._why_not(self._compare(adapters), self.settings.silence_s)

    async def why_not_sampling(self) -> str:
        """Check that the engine samples one token."""
        return await self._why_not(self._sample_one(), self.settings.stall_s)

    async def watch(self, adapters: Callable[[], Collection[str]], mark: Callable[[], float | None]) -> str:
        """Watch the engine until something is wrong, and return what it is. `mark` changes with every sequence that
        ends; None while none runs."""
        counted, since = -1.0, time.monotonic()
        while True:
            await asyncio.sleep(self.settings.interval_s)
            if reason := await self.why_unwell(adapters()):
                return reason
            number = await self._progress(mark())
            if number != counted:
                counted, since = number, time.monotonic()
            stalled_s = time.monotonic() - since
            if stalled_s > (self.settings.stall_s if counted >= 0 else self.settings.stall_uncounted_s):
                return f"has computed no token for {stalled_s:.0f} s"

    async def _why_not(self, question, patience_s: float) -> str:
        try:
            async with asyncio.timeout(patience_s):
                return await question
        except TimeoutError:
            return f"has not answered for {patience_s:.0f} s"
        except Unreachable as error:
            return f"does not answer ({error})"
        except RejectedByEngine as error:
            return f"answers {error.status} ({error.message})"

    async def _compare(self, adapters: Collection[str]) -> str:
        await self.dialect.check_health()
        now, before = await self.dialect.served(), self.served
        if (now.root, now.name) != (before.root, before.name):
            return f"serves {now.root} now, not {before.root}"
        if now.max_context_length != before.max_context_length:
            return f"has a context of {now.max_context_length} now, not {before.max_context_length}"
        missing = set(adapters) - set(now.adapters)
        return f"has forgotten {len(missing)} of its adapters" if missing else ""

    async def _sample_one(self) -> str:
        await self.dialect.complete(self.served.name, EncodedPrompt(np.zeros(1, np.int32)), probe_spec())
        return ""

    async def _progress(self, mark: float | None) -> float:
        """A number that changes while the engine makes progress, and always while it has nothing to do; 0 or more where
        it counts tokens."""
        if mark is None:
            return time.monotonic()
        with contextlib.suppress(RejectedByEngine, Unreachable):
            number = await self.dialect.num_tokens()
            if number is not None:
                return number
        return -mark
