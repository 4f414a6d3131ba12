"""The worker process's loop: the one ordered command stream of this host, from the server to the engine and back.

The main thread issues commands and never waits for the device. Each command's `Pending` goes to a completion thread,
which waits for the outcomes in the same order and answers; where the engine runs sampling beside training, sampling has
its own. Saved adapters wait on threads of their own: files may take long, and nothing should wait behind them.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tx_async.dispatch.dealer import Dealer, Received
from tx_async.errors import EngineGone, TxError
from tx_async.storage.probe import check_probe
from tx_async.wire.worker import (
    AdmitSequences,
    CancelSequences,
    LoadSampler,
    SampleQuantum,
    SaveAdapter,
    Welcome,
)
from tx_async.worker.engine_api import Engine, Pending, ReportProgress, WatchedEngine
from tx_async.worker.exit_codes import ExitCode

logger = logging.getLogger(__name__)

SAMPLING = (AdmitSequences, CancelSequences, LoadSampler, SampleQuantum)
SAVING_THREADS = 2
UNANSWERED_COMMANDS_MAX = 64
"""Issued commands whose outcome is still awaited; the server keeps far fewer in flight."""

Completions = queue.Queue[tuple[int, Pending] | None]
CreateEngine = Callable[[Welcome, ReportProgress], Engine]


class Worker:
    """One engine, attached by one dealer, for one life: whatever ends it, a new process starts with a new engine."""

    def __init__(self, dealer: Dealer, create_engine: CreateEngine):
        self.dealer = dealer
        self.create_engine = create_engine
        #: issued commands in stream order; None ends the completion thread
        self._completions: Completions = queue.Queue(UNANSWERED_COMMANDS_MAX)
        #: issued sampling commands; the same queue where nothing overlaps
        self._sampling: Completions = self._completions
        #: set by the first fatal error, on any thread; nothing is answered after it
        self._crash: BaseException | None = None
        #: commands that wait on threads of their own, so that nothing waits behind them
        self._slow: tuple[type, ...] = (SaveAdapter,)
        #: False while the engine is being built
        self.is_serving = False

    def run(self) -> ExitCode:
        """Attach, serve until told to stop, and say how it ended. Raises `TxError` when it could not begin or go on."""
        welcome = self.dealer.attach()
        if welcome.storage_probe:
            check_probe(welcome.checkpoints_base, welcome.storage_probe)
        engine = self.create_engine(welcome, self.dealer.progress)
        self.dealer.vitals = engine.vitals
        info = engine.info()
        if info.overlaps:
            self._sampling = queue.Queue(UNANSWERED_COMMANDS_MAX)
        if info.continuous:
            self._slow = (SaveAdapter, LoadSampler)
        self.dealer.ready(info)
        self.is_serving = True
        if isinstance(engine, WatchedEngine):
            engine.watch(self.dealer.stop)
        self._serve(engine)
        if self._crash:
            return ExitCode.CRASHED
        self.dealer.goodbye("stopped")
        engine.close()
        return ExitCode.STOPPED

    def _serve(self, engine: Engine) -> None:
        queues = [self._completions] if self._sampling is self._completions else [self._completions, self._sampling]
        threads = [
            threading.Thread(target=self._complete_all, args=(q,), name="completions", daemon=True) for q in queues
        ]
        for thread in threads:
            thread.start()
        with ThreadPoolExecutor(SAVING_THREADS, thread_name_prefix="saving") as saving:
            for received in self.dealer.commands():
                if self._crash:
                    break
                self._issue(engine, received, saving)
            for completions in queues:
                completions.put(None)
            for thread in threads:
                thread.join()

    def _issue(self, engine: Engine, received: Received, saving: ThreadPoolExecutor) -> None:
        try:
            pending = engine.execute(received.command, received.tensors)
        except Exception as error:
            pending = _raiser(error)
        if isinstance(received.command, self._slow):
            saving.submit(self._complete, received.number, pending)
        else:
            completions = self._sampling if isinstance(received.command, SAMPLING) else self._completions
            completions.put((received.number, pending))

    def _complete_all(self, completions: Completions) -> None:
        while (item := completions.get()) is not None:
            self._complete(*item)

    def _complete(self, number: int, pending: Pending) -> None:
        if self._crash:
            return
        try:
            result, tensors = pending()
            self.dealer.reply(number, result, tensors)
        except EngineGone as error:
            self.dealer.stop(error)
        except TxError as error:
            self.dealer.fail(number, error)
        except Exception as error:
            self._fail_fatally(number, error)

    def _fail_fatally(self, number: int, error: Exception) -> None:
        if self._crash:
            return
        self._crash = error
        logger.critical("fatal at command %d", number, exc_info=error)
        self.dealer.fail(number, error, fatal=True)
        self.dealer.stop()


def _raiser(error: Exception) -> Pending:
    def pending():
        raise error

    return pending
