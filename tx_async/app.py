"""The composition root: `hypercorn tx_async.app:app` serves; `create_app(config)` is what the command line uses.

At start it reads the base model's description, opens the journal (which migrates and takes the lease), checks that base
model, journal and storage belong together, recovers the live state, opens the doors for workers and spawns the local
ones. A server that cannot start says why in one line and ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import anyio
from msgspec import Struct
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from tx_async import base_model as base_models
from tx_async import config as configuration
from tx_async.actor import running as actors_running
from tx_async.api.audit import follow_keys
from tx_async.api.gate import Gate, GateMiddleware
from tx_async.api.key_file import KeyFile
from tx_async.api.measured import MeasureMiddleware
from tx_async.api.owner import Owners
from tx_async.api.routes import EXCEPTION_HANDLERS, create_routes
from tx_async.config import ServerConfig
from tx_async.dashboard.rates import Rates, keep
from tx_async.dispatch.router import Router
from tx_async.errors import StorageError
from tx_async.exposition import metrics_route
from tx_async.health import Health
from tx_async.identity import Identity
from tx_async.journal.factory import open_journal
from tx_async.journal.marks import map_marks
from tx_async.loop_lag import watch_lag
from tx_async.metrics import Metrics
from tx_async.names import tokenizer_id
from tx_async.private import close_data, make_writable_folder, private_umask
from tx_async.scheduler.core import marks
from tx_async.scheduler.scheduler import Scheduler
from tx_async.storage.probe import write_probe
from tx_async.storage.store import Store
from tx_async.storage.sweep import sweep_for_ever
from tx_async.tracing import open_tracing
from tx_async.wire.facts import WorkerFact, WorkerReady
from tx_async.wire.records import Delete
from tx_async.wire.worker import StorageProbe
from tx_async.worker.supervisor import DEFAULT_ENGINE, Supervisor

WORKERS_STOP_S = 2.0
"""The part of `shutdown_ms` that draining and snapshots leave for the workers to end."""

_log = logging.getLogger(__name__)


class Observed(Protocol):
    def statistics(self) -> Struct:
        """A struct of `Counter` and `Gauge` fields."""
        ...


class Server:
    """All actors of the process, started and stopped together."""

    def __init__(self, config: ServerConfig, engine: str = DEFAULT_ENGINE):
        self.config = config
        self._engine = engine
        self.metrics = Metrics()
        self.tracing = open_tracing(config.otlp_endpoint)
        self.router: Router | None = None
        self.supervisor: Supervisor | None = None
        self.scheduler: Scheduler | None = None
        self.identity: Identity | None = None
        #: the actors that have statistics, by name; `running` makes them
        self.observed: dict[str, Observed] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Scheduler]:
        """Serve while the context is open. An actor that dies of a broken invariant ends the context with its error."""
        with private_umask():
            close_data(self.config)
            async with self._actors_running() as scheduler:
                yield scheduler

    @asynccontextmanager
    async def _actors_running(self) -> AsyncIterator[Scheduler]:
        config = self.config
        base_model = await anyio.to_thread.run_sync(
            base_models.read, config.base_model, config.base_model_name, config.backend_config
        )
        self._say_where_the_tokenizer_is(base_model.path)
        if base_model.tokenizer_problem:
            _log.warning("Requests with stop strings will be refused: %s.", base_model.tokenizer_problem)
        journal = open_journal(config)
        journal.took = self.metrics.commit.observe
        records = await journal.open()
        try:
            if config.local_workers:
                make_writable_folder(Path(config.resolved_compilation_cache_dir), "compilation_cache_dir")
            identity = self.identity = Identity(config, base_model, journal, records)
            records = await identity.settle()
        except BaseException:
            await journal.close()
            raise
        store = identity.store
        router = self.router = Router(config, self._tell, await _storage_probe(store, config))
        router.storage_id, router.base_fingerprint = store.storage_id, identity.base_fingerprint
        try:
            await router.start()
            supervisor = self.supervisor = Supervisor(config, router, engine=self._engine)
            scheduler = self.scheduler = Scheduler(
                config,
                base_model,
                journal,
                records,
                send=router.send,
                delete_files=store.delete_prefix,
                list_files=store.list_keys,
                dismiss=router.dismiss,
                widen=router.widen,
                worker_status=supervisor.waiting_for,
                storage_status=identity.waiting_for,
                worker_silence=router.silence,
                metrics=self.metrics,
                tracing=self.tracing,
                marks=marks.ReplayMarks(map_marks(config.data_path, identity.record.journal_id, marks.NUM_BYTES)),
            )
            router.lora_rank = scheduler.state.highest_rank
            self.observed = {actor.name: actor for actor in (scheduler, journal, router, supervisor)}
            async with actors_running(scheduler, router, supervisor, journal, identity) as group:
                group.start_soon(sweep_for_ever, store, lambda: scheduler.models)
                yield scheduler
                deadline = time.monotonic() + config.shutdown_ms / 1000
                await scheduler.stop(config.shutdown_ms / 1000 - WORKERS_STOP_S)
                await supervisor.stop(max(WORKERS_STOP_S, deadline - time.monotonic()))
        finally:
            with anyio.CancelScope(shield=True):
                await router.stop()
                await journal.close()
                if self.tracing:
                    await anyio.to_thread.run_sync(self.tracing.shutdown)

    def _say_where_the_tokenizer_is(self, folder: str) -> None:
        config = self.config
        if tokenizer_id(config.tokenizer, config.base_model, config.base_model_name, folder) == folder:
            _log.info(
                "Clients are told that the tokenizer is in %s: on other machines they will not find it. Set tokenizer, "
                "or base_model_name, to its hub name.",
                folder,
            )

    def _tell(self, fact: WorkerFact) -> None:
        assert self.scheduler is not None and self.identity is not None
        if isinstance(fact, WorkerReady):
            self.identity.base_loaded(fact.info.base_model_digest)
        self.scheduler.tell(fact)


async def _storage_probe(store: Store, config: ServerConfig) -> StorageProbe | None:
    """Write the probe for workers on other hosts, if there may be any. A server whose storage is away starts all the
    same."""
    if not config.worker_address:
        return None
    try:
        # Not the address alone: a second server, before it finds the address taken, would replace the first one's word.
        return await write_probe(store, f"{config.data_path} {config.worker_address}")
    except StorageError as error:
        _log.warning("Workers are not asked whether they share the storage: %s", error)
        return None


MIDDLEWARE = [Middleware(MeasureMiddleware), Middleware(GateMiddleware)]


def create_app(config: ServerConfig | None = None, engine: str = DEFAULT_ENGINE) -> Starlette:
    """The ASGI application. Without `config`, it is read from `TX_…` variables and TX_CONFIG when the server starts."""
    app = Starlette(lifespan=_lifespan, exception_handlers=EXCEPTION_HANDLERS, middleware=MIDDLEWARE)
    app.router.redirect_slashes = False
    app.state.config = config
    app.state.engine = engine
    app.state.scheduler = None  # until it has started
    return app


def begin_stop(app: Starlette) -> None:
    """The process was told to stop: whoever waits for a live answer hears of it now. An ASGI server that does not
    call this tells the app only at the end of its lifespan, when it has cut all connections."""
    if app.state.scheduler is not None:
        app.state.scheduler.begin_stop()


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    config = app.state.config or configuration.load()
    server = Server(config, app.state.engine)
    app.state.gate = Gate(config)
    app.state.metrics, app.state.tracing = server.metrics, server.tracing
    key_file = KeyFile(config.api_keys_file) if config.api_keys_file else None
    owners = Owners(key_file.current if key_file else None)
    started = False
    try:
        async with server.running() as scheduler:
            assert server.identity is not None
            app.state.scheduler = scheduler
            if key_file:
                follow_keys(key_file, scheduler)
            store = server.identity.store
            assert server.supervisor is not None
            external = server.supervisor.external_waiting_for
            write = partial(_write_nothing, scheduler)
            health = Health(store, config.data_path, write, scheduler.waiting_for, scheduler.silence, external)
            rates = Rates()
            routes = create_routes(scheduler, config, store, owners=owners, health=health, rates=rates)
            app.router.routes.extend(routes)
            app.router.routes.append(_metrics_route(server, scheduler, app.state.gate, owners))
            started = True
            metrics = server.metrics
            tasks = [
                asyncio.create_task(keep(rates, scheduler, scheduler.clock)),
                asyncio.create_task(watch_lag(metrics.event_loop_late.observe, metrics.event_loop_held.observe)),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
    except BaseException as error:
        if started:
            # The ASGI server would go on without its actors. End the process; the journal brings it back.
            _log.critical("The server stops: %s", _reason(error))
            os.kill(os.getpid(), signal.SIGTERM)
        raise


async def _write_nothing(scheduler: Scheduler) -> None:
    """Commit a transaction without content that still goes all the way to the disk."""
    await scheduler.journal.commit([Delete("audit", "health")])


def _metrics_route(server: Server, scheduler: Scheduler, gate: Gate, owners: Owners) -> Route:
    assert server.router is not None
    return metrics_route(server.config, server.observed, scheduler, server.router, server.metrics, gate, owners)


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or repr(error)


app = create_app()
