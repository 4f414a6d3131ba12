"""A worker that samples through an external inference engine: the server's commands on one side, HTTP on the other
(`dialect.py`).

It attaches once that engine has answered and sampled its trial (`external_attach.py`). Admitted sequences run by
themselves, one request each; a quantum waits for their outcomes. When the engine is gone (dead, silent, failing, or not
the same as before: `external_health.py`), the worker leaves with one line in the log, and the server gives its
sequences to any worker that can take them. The next life of this process waits until the engine answers again.

All state belongs to the event loop's thread. Commands arrive on the main thread and are passed to it in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from tx_async.errors import EngineError, EngineGone
from tx_async.storage.store import Store
from tx_async.wire import worker as wire
from tx_async.wire.worker import BASE_SLOT, EngineInfo, SequenceSpec, Welcome
from tx_async.worker.dialect import (
    CompletionPart,
    Dialect,
    EncodedPrompt,
    EngineCompletion,
    RejectedByEngine,
    Served,
    Unreachable,
)
from tx_async.worker.engine_api import Pending, Reply, ReportProgress
from tx_async.worker.external_adapters import AdapterFolder
from tx_async.worker.external_attach import Attachment, named, read_subject
from tx_async.worker.external_health import EngineHealth, HealthSettings
from tx_async.worker.external_report import SampleFailure, SampleOutcome, SamplePart, report
from tx_async.worker.external_settings import ExternalSettings
from tx_async.worker.external_trial import Subject

QUANTUM_S = 1.0
"""How long a quantum waits for news."""
GATHER_S = 0.003
"""How long a quantum waits for more news after the first: news tends to come together."""
TRIES = 2
"""Attempts at one sequence, while the engine is well otherwise."""
CLOSE_S = 3.0

T = TypeVar("T")


class _Left(Exception):
    """The worker is leaving: nothing is answered any more."""


@dataclass(eq=False)
class _Sequence:
    spec: SequenceSpec
    prompt: EncodedPrompt
    task: asyncio.Task[None] | None = None


class ExternalEngine:
    """Implements `worker.engine_api.WatchedEngine` for sampling alone."""

    def __init__(
        self,
        make_dialect: Callable[[], Dialect],
        welcome: Welcome,
        settings: ExternalSettings,
        health: HealthSettings | None = None,
    ):
        """`make_dialect` is called on the event loop's thread."""
        self.config, self.settings, self.base_model = welcome.engine, settings, welcome.base_model
        self.store = Store(welcome.checkpoints_base)
        self.adapters = AdapterFolder(settings.lora_dir, self.store, settings.name)
        self._make_dialect, self._health_settings = make_dialect, health or HealthSettings()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="external", daemon=True)
        self._thread.start()
        # Set by `attach`:
        self._dialect: Dialect
        self._served: Served
        self._subject: Subject
        self._health: EngineHealth
        self._info: EngineInfo
        # The loop's own:
        #: sampler slot -> name of the adapter in it
        self._slots: dict[int, str] = {}
        #: admitted and without an outcome
        self._running: dict[int, _Sequence] = {}
        #: what the next quantum reports of sequences that are not in `_running` any more
        self._outcomes: list[SampleOutcome] = []
        #: and of watched sequences that go on
        self._parts: list[SamplePart] = []
        self._last_news = time.monotonic()
        self._news = asyncio.Event()
        self._examining = asyncio.Lock()
        self._gone: EngineGone | None = None
        self._on_gone: Callable[[EngineGone], None] = lambda error: None
        self._watching: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<ExternalEngine {self.settings.url} [{len(self._running)} running | {len(self._slots)} adapters]>"

    def attach(self, progress: ReportProgress) -> None:
        """Wait for the engine, for as long as it takes, and try it. Raises `ConfigError` when it cannot serve this
        server."""
        self._subject = read_subject(self.base_model, self.settings.allow_unproven)
        self.adapters.sees = self._subject.sees
        self._call(self._attach(progress))()

    async def _attach(self, progress: ReportProgress) -> None:
        self._dialect = self._make_dialect()
        attachment = Attachment(self._dialect, self.adapters, self.store, self.config, self.base_model)
        self._served, self._info = await attachment.wait(self._subject, progress)
        self._health = EngineHealth(self._dialect, self._served, self._health_settings)

    def info(self) -> EngineInfo:
        return self._info

    def vitals(self) -> wire.Heartbeat:
        return wire.Heartbeat()

    def watch(self, on_gone: Callable[[EngineGone], None]) -> None:
        self._on_gone = on_gone
        self._loop.call_soon_threadsafe(self._begin_to_watch)

    def close(self) -> None:
        """Unload our adapters from the engine, if it still answers."""
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _close(self) -> None:
        tasks = [*filter(None, [self._watching, *(sequence.task for sequence in self._running.values())])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._running.clear()
        names, self._slots = list(self._slots.values()), {}
        for name in names:
            await self._unload(name)
        await self._dialect.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> Callable[[], T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result

    # ---- commands

    def execute(self, command: wire.Command, tensors: Sequence[np.ndarray]) -> Pending:
        match command:
            case wire.LoadSampler(sampler_slot=slot, key=key):
                return self._call(self._load(slot, key))
            case wire.AdmitSequences(sequences=specs):
                prompts = {index: EncodedPrompt(tensors[index]) for index in {spec.prompt_index for spec in specs}}
                self._loop.call_soon_threadsafe(
                    self._admit, [_Sequence(spec, prompts[spec.prompt_index]) for spec in specs]
                )
            case wire.CancelSequences(sequence_ids=ids):
                self._loop.call_soon_threadsafe(self._cancel, ids)
            case wire.SampleQuantum():
                return self._call(self._quantum())
            case _:
                raise EngineError(f"This worker samples only; it was sent {type(command).__name__}.")
        return lambda: (wire.Done(), [])

    def _admit(self, sequences: list[_Sequence]) -> None:
        for sequence in sequences:
            self._running[sequence.spec.sequence_id] = sequence
            sequence.task = self._loop.create_task(self._run(sequence))

    def _cancel(self, sequence_ids: Sequence[int]) -> None:
        """Close the sequences' connections, which ends them in the engine."""
        for sequence_id in sequence_ids:
            sequence = self._running.pop(sequence_id, None)
            if sequence and sequence.task:
                sequence.task.cancel()
        self._outcomes = [outcome for outcome in self._outcomes if outcome.spec.sequence_id not in sequence_ids]
        self._parts = [part for part in self._parts if part.sequence_id not in sequence_ids]

    async def _quantum(self) -> Reply:
        if self._running and not (self._outcomes or self._parts or self._gone):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), QUANTUM_S)
            await asyncio.sleep(GATHER_S)
        if self._gone:
            raise self._gone
        self._news.clear()
        outcomes, self._outcomes = self._outcomes, []
        parts, self._parts = [part for part in self._parts if part.sequence_id in self._running], []
        return report(outcomes, parts, len(self._running))

    # ---- adapters

    async def _load(self, slot: int, key: str) -> Reply:
        if old := self._slots.pop(slot, None):
            await self._unload(old)
        name, folder = await asyncio.to_thread(self.adapters.write, key, self._served.root)
        refused = await asyncio.to_thread(self._subject.why_unfit, folder) or await self._why_refused(name, folder)
        if refused:
            self.adapters.remove(name)
        else:
            self._slots[slot] = name
        return wire.Loaded(refused=refused), []

    async def _why_refused(self, name: str, folder: str) -> str:
        """Why the engine refuses an adapter; "" once it is loaded."""
        if name in self._slots.values():
            return ""
        try:
            await self._dialect.load_adapter(name, folder)
        except (RejectedByEngine, Unreachable) as error:
            try:
                await self._leave_if_unwell()
            except _Left:
                raise self._gone or EngineGone() from error
            return f"{named(self._dialect)} refuses it: {error}"
        return ""

    async def _unload(self, name: str) -> None:
        """Unload an adapter on which nothing runs any more."""
        if name in self._slots.values():
            return
        with contextlib.suppress(RejectedByEngine, Unreachable):
            await self._dialect.unload_adapter(name)
        await asyncio.to_thread(self.adapters.remove, name)

    # ---- sequences

    async def _run(self, sequence: _Sequence) -> None:
        spec, prompt, began_at = sequence.spec, sequence.prompt, time.monotonic()
        try:
            result = await self._sample(spec, prompt)
        except _Left:
            return
        if self._running.pop(spec.sequence_id, None):
            self._last_news = time.monotonic()
            self._outcomes.append(SampleOutcome(spec, len(prompt), result, 1000 * (self._last_news - began_at)))
            self._news.set()

    async def _sample(self, spec: SequenceSpec, prompt: EncodedPrompt) -> EngineCompletion | SampleFailure:
        model = self._served.name if spec.sampler_slot == BASE_SLOT else self._slots.get(spec.sampler_slot)
        if model is None:
            return SampleFailure("server", f"Sampler slot {spec.sampler_slot} is empty.")
        if spec.prompt_scores:
            return SampleFailure("server", "This worker does not score prompts.")
        problem = ""
        on_part = partial(self._heard, spec.sequence_id) if spec.stream else None
        for _ in range(TRIES):
            try:
                return await self._dialect.complete(model, prompt, spec, on_part)
            except RejectedByEngine as error:
                problem = f"{named(self._dialect)} answered {error.status}: {error.message}"
                if error.is_unknown_model:
                    self._leave(f"does not know {model} any more ({error.message})")
                    raise _Left from error
                if not error.is_failure:
                    break
            except Unreachable as error:
                problem = f"{named(self._dialect)}: {error}"
            await self._leave_if_unwell()
        return SampleFailure("server", problem)

    def _heard(self, sequence_id: int, part: CompletionPart) -> None:
        self._last_news = time.monotonic()
        self._parts.append(SamplePart(sequence_id, part))
        self._news.set()

    # ---- leaving

    def _begin_to_watch(self) -> None:
        self._watching = self._loop.create_task(self._watch())

    async def _watch(self) -> None:
        self._leave(await self._health.watch(self._slots.values, self._mark))

    def _mark(self) -> float | None:
        return self._last_news if self._running else None

    async def _leave_if_unwell(self) -> None:
        """Something failed: was it the request, or the engine? Raises `_Left`."""
        async with self._examining:
            if not self._gone:
                reason = await self._health.why_unwell(self._slots.values()) or await self._health.why_not_sampling()
                if reason:
                    self._leave(reason)
        if self._gone:
            raise _Left

    def _leave(self, reason: str) -> None:
        if self._gone:
            return
        text = f"{named(self._dialect)} {reason}: this worker leaves, and attaches again when it is back."
        self._gone = EngineGone(text)
        for sequence in self._running.values():
            if sequence.task and sequence.task is not asyncio.current_task():
                sequence.task.cancel()
        self._news.set()
        self._on_gone(self._gone)
