"""The app under hypercorn on uvloop, in this process: `tx-async serve`.

Hypercorn speaks HTTP; this module decides how a server for long polls starts and stops. The port is taken before
anything else starts, so a second server on it changes nothing. The first SIGINT or SIGTERM stops it, in bounded time:
live answers end at once with an error that says to try again, open polls get `GRACEFUL_S` to finish, then the app's
lifespan drains and takes its snapshots within `shutdown_ms`. A second signal ends the process at once. When the app
dies of a broken invariant the process stops with exit code 1: the journal brings it back.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import ssl
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from hypercorn.asyncio import run as hypercorn_run
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config as HypercornConfig
from hypercorn.config import Sockets
from hypercorn.utils import LifespanFailureError, wrap_app

from tx_async import freed_memory, logs
from tx_async.api.gate import Gate
from tx_async.api.key_file import read_keys
from tx_async.api.owner import is_loopback
from tx_async.config import ServerConfig
from tx_async.dispatch.attaching import check_lease
from tx_async.errors import ConfigError, TxError
from tx_async.tls import Certificate
from tx_async.worker.supervisor import external_engines

logger = logging.getLogger(__name__)

GRACEFUL_S = 1.0
"""How long open requests may take to end once the server stops; a client repeats a poll that was cut."""
KEEP_ALIVE_S = 120
PORT_MAX = 65_535
BACKLOG = 4096
HEADERS_BYTES_MAX = 64 * 1024
SWITCH_INTERVAL_S = 0.0005
"""How long a thread that decodes a body may keep the event loop waiting for the interpreter."""
UNREAD_PIECES_MAX = 3
"""Pieces (of 64 KiB) of a body that may wait to be read: what comes faster than the budget allows stays in the socket.
A small body that nobody reads is three pieces, with its end and the request's: with room for fewer, its connection
would never go on to the next request."""
STARTUP_S = 600
"""How long a start may take: a long journal is recovered before the server accepts requests."""

EXIT_BROKEN = 1
EXIT_SECOND_SIGNAL = 130


def serve(config: ServerConfig) -> int:
    """Serve until a signal; returns the exit code. Raises `ConfigError` for errors that the operator can fix."""
    check_settings(config)
    logs.configure(config.log_level, config.log_format)
    _raise_open_files_limit()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    freed_memory.keep(config.bodies_bytes_max)
    settings = _hypercorn_settings(config)
    sockets = _bind(settings, config)

    from tx_async.app import begin_stop, create_app

    app = create_app(config)
    server = _HypercornRun(app, settings, sockets, partial(begin_stop, app))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(server.run())


def check_settings(config: ServerConfig) -> None:
    """What keeps a server from starting by the settings and the files that they name alone. Raises `ConfigError`."""
    if config.port > PORT_MAX:
        raise ConfigError(f"port is {config.port}; it must be at most {PORT_MAX}.")
    check_exposure(config)
    Gate(config)
    logs.check(config.log_level, config.log_format)
    check_lease(config)
    external_engines(config)
    if config.api_keys_file:
        read_keys(Path(config.api_keys_file).expanduser())
    _hypercorn_settings(config)


def check_address(config: ServerConfig) -> None:
    """Take the port, and leave it at once. Raises `ConfigError`."""
    taken = _bind(_hypercorn_settings(config), config)
    for each in (*taken.secure_sockets, *taken.insecure_sockets, *taken.quic_sockets):
        each.close()


def check_exposure(config: ServerConfig) -> None:
    """Whoever reaches the server can use it, so only loopback may do without keys. Raises `ConfigError`."""
    if config.api_keys_file or is_loopback(config.host):
        return
    raise ConfigError(
        f"host {config.host} can be reached from other machines, so api_keys_file must be set: "
        "make one with `tx-async keys add NAME`, or listen on 127.0.0.1."
    )


class _HypercornRun:
    """One run of the app under hypercorn."""

    def __init__(self, app: Any, settings: HypercornConfig, sockets: Sockets, begin_stop: Callable[[], None]):
        """begin_stop: tells the app of the signal, before its requests are cut."""
        self.app = app
        self.begin_stop = begin_stop
        self.settings = settings
        self.sockets = sockets
        self.stop = asyncio.Event()
        self.is_signalled = False
        #: why the app's lifespan ended by itself; None while it is well
        self.failure: BaseException | None = None
        self.has_started = False

    async def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        asyncio.get_running_loop().set_exception_handler(_handle_loop_error)
        # There is no setting for that.
        hypercorn_run.TCPServer = _ClosingServer  # pyright: ignore[reportPrivateImportUsage]
        app = wrap_app(self._watched_app, self.settings.wsgi_max_body_size, "asgi")
        try:
            await hypercorn_run.worker_serve(app, self.settings, sockets=self.sockets, shutdown_trigger=self.stop.wait)
        except LifespanFailureError:
            if self.failure is None:
                raise
        if isinstance(self.failure, ConfigError):
            raise self.failure
        return EXIT_BROKEN if self.failure else 0

    def _on_signal(self, number: int) -> None:
        if self.failure:
            return  # the app ends the process this way, and it is ending already
        if self.is_signalled:
            logger.warning("second signal: ending at once")
            os._exit(EXIT_SECOND_SIGNAL)
        self.is_signalled = True
        logger.info("%s: stopping", signal.Signals(number).name)
        self.begin_stop()
        self.stop.set()

    async def _watched_app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return

        async def watched_send(message: Any) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.has_started = True
                # What a start leaves stays for ever: to look through it again and again would only stop the event loop.
                gc.freeze()
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except BaseException as error:
            self.failure = _innermost(error)
            if not self.has_started:
                self.failure = _as_operators_own(self.failure)
            if not isinstance(self.failure, ConfigError | asyncio.CancelledError):
                logger.critical("the server stops: %r", self.failure)
            raise
        finally:
            self.stop.set()


def _handle_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """At the end, open connections are cancelled; asyncio's streams (in Python 3.11) report that as an error."""
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)


def _innermost(error: BaseException) -> BaseException:
    """The error itself, which is what the operator wants: task groups and hypercorn wrap it."""
    while True:
        match error:
            case BaseExceptionGroup(exceptions=[first, *_]):
                told = error.subgroup(ConfigError)  # of several, the one that says what to change
                error = told.exceptions[0] if told else first
            case LifespanFailureError(__context__=BaseException() as inner):
                error = inner
            case _:
                return error


def _as_operators_own(error: BaseException) -> BaseException:
    """Errors that keep a server from starting and come from us or the system are for the operator to fix: one line,
    exit code 2."""
    if isinstance(error, TxError) and not isinstance(error, ConfigError):
        return ConfigError(error.message)
    if isinstance(error, OSError):
        return ConfigError(f"The server cannot start: {error}.")
    return error


class _ClosingServer(TCPServer):
    """hypercorn's, which keeps the descriptor of a connection that its client has closed until its idle time is over:
    clients that open one for each request would use them up."""

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()


class _Settings(HypercornConfig):
    certificate: Certificate | None = None

    def create_ssl_context(self) -> ssl.SSLContext | None:
        context = super().create_ssl_context()
        if context is not None and self.certificate is not None:
            self.certificate.follow(context)
        return context


def _hypercorn_settings(config: ServerConfig) -> _Settings:
    settings = _Settings()
    settings.bind = [f"{config.host}:{config.port}"]
    settings.backlog = BACKLOG
    settings.keep_alive_timeout = KEEP_ALIVE_S
    settings.keep_alive_max_requests = 2**31
    settings.graceful_timeout = GRACEFUL_S
    settings.startup_timeout = STARTUP_S
    settings.shutdown_timeout = config.shutdown_ms / 1000 + 5
    settings.max_app_queue_size = UNREAD_PIECES_MAX
    settings.h11_max_incomplete_size = HEADERS_BYTES_MAX
    settings.include_server_header = False
    settings.errorlog = logging.getLogger("hypercorn")
    settings.loglevel = config.log_level.upper()
    _use_tls(settings, config)
    return settings


def _use_tls(settings: _Settings, config: ServerConfig) -> None:
    """Only HTTP/1.1 is offered, because all latencies were measured with it. Raises `ConfigError`."""
    if not config.tls_cert and not config.tls_key:
        return
    if not config.tls_cert or not config.tls_key:
        raise ConfigError("tls_cert and tls_key belong together: set both.")
    settings.certificate = certificate = Certificate(config.tls_cert, config.tls_key)
    settings.certfile, settings.keyfile = certificate.cert, certificate.key
    settings.alpn_protocols = ["http/1.1"]


def _bind(settings: HypercornConfig, config: ServerConfig) -> Sockets:
    try:
        return settings.create_sockets()
    except OSError as error:
        raise ConfigError(f"Cannot listen on {config.host}:{config.port}: {str(error).rstrip('.')}.") from error


def _raise_open_files_limit() -> None:
    """Every long poll is a connection: allow as many open files as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
