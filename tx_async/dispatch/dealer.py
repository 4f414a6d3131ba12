"""The worker's end of a connection. With `worker/engine_api.py` and the structs of `wire/worker.py`, it is all that a
third-party engine imports.

    with Dealer(address) as dealer:
        welcome = dealer.attach()
        dealer.ready(info)
        for received in dealer.commands():
            dealer.reply(received.number, result, tensors)

One thread owns the socket. It answers for this process while the engine is busy for minutes, so every other method only
puts messages into its queue, from any thread. It also notices when the server is gone (silent for a lease, or the
process that spawned this one is dead) and then ends this process if it does not end by itself: a worker without its
server, or without the rest of its mesh, can only do harm, for example hang in a collective for ever.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import zmq

from tx_async.dispatch.frames import (
    IN_FRAME,
    MESSAGE_BYTES_MAX,
    SMALL_BLOCK_BYTES,
    Block,
    EnvelopeFromWorker,
    EnvelopeToWorker,
    MalformedMessage,
    decode_to_worker,
    encode,
    layout,
    pack_block,
    read_block,
    specs_of,
)
from tx_async.dispatch.security import secure_client
from tx_async.dispatch.shared_memory import ArenaReader, ArenaWriter
from tx_async.errors import Category, ConfigError, TxError, WorkerRefused
from tx_async.wire.worker import (
    PROTOCOL_VERSION,
    Command,
    CommandFailed,
    CommandFinished,
    Done,
    EngineInfo,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    NumberedCommand,
    Progress,
    Ready,
    Refused,
    Result,
    Shutdown,
    Welcome,
    command_digest,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

HELLO_INTERVAL_S = 1.0
UNSENT_RETRY_S = 0.02
"""Seconds between two attempts to send while there is no connection, or its queue is full."""
WAITING_LOG_INTERVAL_S = 10.0
PARENT_POLL_S = 0.5
SIGNAL_POLL_S = 0.2
FORCED_EXIT_S = 2.0
"""How long a process has to end by itself after it lost the server or its mesh: nobody waits for its results then."""
DETACHED_EXIT_CODE = 4


class Detached(TxError):
    """The server, or the rest of this worker's mesh, is gone: start again."""

    def __init__(self, message: str, is_meant: bool = False):
        super().__init__(message)
        self.is_meant = is_meant


class StreamDiverged(TxError):
    """This process would run another command than the rest of its mesh."""


@dataclass(frozen=True)
class Received:
    """A command, with views of its tensors that are valid until the command is answered."""

    number: int
    command: Command
    tensors: list[np.ndarray]


@dataclass
class _Outgoing:
    message: FromWorker
    block: Block | None = None
    frame: memoryview | None = None


@dataclass
class _Ended:
    """Nothing more will be received: the end is orderly (None), or due to an error."""

    error: TxError | None = None


@dataclass
class _Incoming:
    envelope: EnvelopeToWorker
    payload: memoryview | None
    arrived: float = field(default_factory=time.perf_counter)


class Dealer:
    """One connection to the server, for one life of an engine. The module's docstring shows its use."""

    def __init__(
        self,
        connect: str,
        *,
        name: str = "w0",
        process_id: int = 0,
        num_processes: int = 0,
        coordinator_address: str = "",
        token: str = "",
        capabilities: frozenset = frozenset({"train", "sample", "score"}),
        parent_pid: int = 0,
        vitals: Callable[[], Heartbeat] = Heartbeat,
        on_beat: Callable[[float], None] = lambda lease_s: None,
    ):
        """`parent_pid`: the server's, when it spawned this process; 0 when somebody else did.

        `on_beat`: called on the thread at `Welcome` and every heartbeat, with the lease in seconds (infinity before
        `Welcome`).
        """
        self.connect = connect
        self.vitals = vitals
        self._on_beat = on_beat
        self._is_local = connect.startswith("ipc://")
        self._hello = Hello(
            protocol_version=PROTOCOL_VERSION, name=name, token=token, host=socket.gethostname(), pid=os.getpid(),
            process_id=process_id, num_processes=num_processes, coordinator_address=coordinator_address,
            capabilities=capabilities, shared_memory=self._is_local,
        )  # fmt: skip
        self._parent_pid = parent_pid
        #: commands, and finally their end, from the thread to `receive`
        self._incoming: queue.SimpleQueue[_Incoming | _Ended] = queue.SimpleQueue()
        self._outgoing: collections.deque[_Outgoing] = collections.deque()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._welcome: queue.SimpleQueue[Welcome | TxError] = queue.SimpleQueue()
        self._inbox: ArenaReader | None = None
        self._outbox: ArenaWriter | None = None
        self._next_number = 1
        #: number -> time of arrival of each command not answered yet
        self._arrived: dict[int, float] = {}
        #: `.time` for each thread that answers: what one thread answers ran one after the other
        self._last_answer = threading.local()
        # The thread's own:
        self._is_attached = False
        self._heartbeat_s = HELLO_INTERVAL_S
        self._lease_s = float("inf")
        self._last_heard = time.monotonic()
        self._force_exit_at = float("inf")
        self._is_closing = False
        self._context = zmq.Context(io_threads=1)
        self._socket = self._open()
        self._thread = threading.Thread(target=self._run, name="dealer", daemon=True)

    def _open(self) -> zmq.Socket:
        if not self.connect.startswith(("ipc://", "tcp://")):
            raise ConfigError(
                f"--connect is {self.connect!r}; it must look like tcp://host:7001 or ipc:///path/of.sock."
            )
        connection = self._context.socket(zmq.DEALER)
        connection.immediate = True  # nothing is queued for a connection that does not exist yet
        connection.linger = 500
        connection.maxmsgsize = MESSAGE_BYTES_MAX
        if not self._is_local:
            secure_client(connection, self._hello.token)
        connection.connect(self.connect)
        return connection

    def __enter__(self) -> Dealer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- for the worker, from any thread

    def attach(self) -> Welcome:
        """Wait for the server, for as long as it takes. Raises `WorkerRefused`, or `Detached` after `stop`."""
        self._thread.start()
        answer = _get(self._welcome)
        if isinstance(answer, TxError):
            raise answer
        return answer

    def progress(self, stage: str, done: float, total: float) -> None:
        self._post(_Outgoing(Progress(stage=stage, done=float(done), total=float(total))))

    def ready(self, info: EngineInfo) -> None:
        self._post(_Outgoing(Ready(info=info)))

    def commands(self) -> Iterator[Received]:
        """Yield commands in order until the server or `stop` ends the stream. Raises like `receive`."""
        while received := self.receive():
            yield received

    def receive(self) -> Received | None:
        """The next command; None when there will be no more. Raises `Detached`, and `StreamDiverged` when it is not
        the one that every other process of the mesh gets."""
        item = _get(self._incoming)
        if isinstance(item, _Ended):
            if item.error:
                raise item.error
            return None
        message = item.envelope.message
        assert isinstance(message, NumberedCommand)
        self._check(message)
        tensors = self._read(message, item.envelope.block, item.payload)
        self._arrived[message.number] = item.arrived
        return Received(message.number, message.command, tensors)

    def reply(self, number: int, result: Result, tensors: Sequence[np.ndarray] = ()) -> None:
        """Answer a command; its tensors must not be read any more. Of a mesh, only process 0 sends the result."""
        now = time.perf_counter()
        began = max(self._arrived.pop(number), getattr(self._last_answer, "time", 0.0))
        elapsed_ms = 1000 * (now - began)
        self._last_answer.time = now
        if self._hello.process_id != 0:
            result, tensors = Done(), ()
        specs = specs_of(tensors)
        message = CommandFinished(number=number, result=result, elapsed_ms=elapsed_ms, tensors=specs)
        if not tensors:
            return self._post(_Outgoing(message))
        offsets, num_bytes = layout(specs)
        block = None
        if self._outbox and num_bytes >= SMALL_BLOCK_BYTES:
            block = self._outbox.write(tensors, offsets, num_bytes)
        if block:
            return self._post(_Outgoing(message, block))
        self._post(_Outgoing(message, Block(IN_FRAME, num_bytes), pack_block(tensors, offsets, num_bytes)))

    def fail(self, number: int, error: BaseException, *, fatal: bool = False) -> None:
        """Answer a command with an error; `fatal` when this engine can no longer be trusted."""
        self._arrived.pop(number, None)
        category: Category = error.category if isinstance(error, TxError) else "server"
        text = str(error) if isinstance(error, TxError) else f"{type(error).__name__}: {error}"
        name = type(error).__name__ if isinstance(error, TxError) else ""
        self._post(_Outgoing(CommandFailed(number=number, category=category, message=text, fatal=fatal, error=name)))

    def goodbye(self, reason: str = "") -> None:
        self._post(_Outgoing(Goodbye(reason)))

    def stop(self, error: TxError | None = None) -> None:
        """Make `attach` and `receive` return; called from a signal handler or another thread."""
        self._incoming.put(_Ended(error))
        self._welcome.put(error or Detached("stopped before the server answered"))

    def close(self) -> None:
        """Send what is still to be sent, and end the thread. A second call does nothing."""
        if self._socket.closed:
            return
        self._is_closing = True
        self._wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()
        self._context.term()
        for arena in (self._inbox, self._outbox):
            if arena:
                arena.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _post(self, outgoing: _Outgoing) -> None:
        self._outgoing.append(outgoing)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes the thread as well
            os.write(self._wake_writer, b"\0")

    # ---- commands

    def _check(self, message: NumberedCommand) -> None:
        if message.number != self._next_number:
            raise StreamDiverged(f"Command {message.number} arrived, {self._next_number} is next.")
        digest = command_digest(message.number, message.command, message.tensors)
        if digest != message.digest:
            kind = type(message.command).__name__
            raise StreamDiverged(
                f"Command {message.number} ({kind}) has digest {digest} here and {message.digest} at the server."
            )
        self._next_number += 1

    def _read(self, message: NumberedCommand, block: Block | None, payload: memoryview | None) -> list[np.ndarray]:
        if not message.tensors:
            return []
        try:
            if block and block.offset == IN_FRAME and payload is not None:
                return read_block(payload, block, message.tensors)
            if block and self._inbox:
                return self._inbox.read(block, message.tensors)
        except MalformedMessage as error:
            raise StreamDiverged(f"Command {message.number}: {error}") from error
        raise StreamDiverged(f"Command {message.number} came without its tensors.")

    # ---- the thread

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        started = next_log = time.monotonic()
        next_beat = 0.0
        while not self._is_closing:
            self._clear_wake()
            self._receive_all()
            is_stuck = not self._send_all()
            now = time.monotonic()
            if now >= next_beat:
                is_stuck = not self._beat()
                next_beat = now + (UNSENT_RETRY_S if is_stuck else self._heartbeat_s)
            if not self._is_attached and now >= next_log + WAITING_LOG_INTERVAL_S:
                next_log = now
                logger.warning("have waited %.0f s for the server at %s: it is not running there, or has another token",
                               now - started, self.connect)  # fmt: skip
            self._watch(now)
            poller.poll(int(1000 * (UNSENT_RETRY_S if is_stuck else min(PARENT_POLL_S, self._heartbeat_s / 2))))
        self._send_all()

    def _clear_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_reader, 4096)

    def _beat(self) -> bool:
        self._on_beat(self._lease_s)
        message = self.vitals() if self._is_attached else self._hello
        return self._send(_Outgoing(message))

    def _send_all(self) -> bool:
        """False when something could not be sent."""
        while self._outgoing:
            if not self._send(self._outgoing[0]):
                return False
            self._outgoing.popleft()
        return True

    def _send(self, outgoing: _Outgoing) -> bool:
        parts: list = [encode(EnvelopeFromWorker(outgoing.message, outgoing.block))]
        if outgoing.frame is not None:
            parts.append(outgoing.frame)
        try:
            self._socket.send_multipart(parts, zmq.DONTWAIT, copy=outgoing.frame is None)
        except zmq.Again:
            return False
        return True

    def _receive_all(self) -> None:
        while True:
            try:
                header = self._socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            payload = self._socket.recv(zmq.DONTWAIT, copy=False).buffer if self._socket.rcvmore else None
            self._last_heard = time.monotonic()
            try:
                self._handle(_Incoming(decode_to_worker(header), payload))
            except MalformedMessage as error:
                self._end(StreamDiverged(f"The server sent a malformed message: {error}"))

    def _handle(self, incoming: _Incoming) -> None:
        for offset in incoming.envelope.released:
            if self._outbox:
                self._outbox.free(offset)
        match incoming.envelope.message:
            case NumberedCommand():
                self._incoming.put(incoming)
            case Heartbeat():
                pass
            case Welcome() as welcome:
                self._handle_welcome(welcome)
            case Refused(reason=reason, is_final=is_final, is_meant=is_meant):
                self._end(Detached(reason, is_meant) if self._is_attached and not is_final else WorkerRefused(reason))
            case Shutdown():
                self._incoming.put(_Ended())

    def _handle_welcome(self, welcome: Welcome) -> None:
        if self._is_attached:
            return
        try:
            self._inbox = ArenaReader(welcome.inbox) if welcome.inbox else None
            self._outbox = ArenaWriter(welcome.outbox) if welcome.outbox else None
        except OSError as error:
            return self._end(ConfigError(f"The server's shared memory cannot be mapped: {error}."))
        self._is_attached = True
        self._heartbeat_s = welcome.heartbeat_interval_ms / 1000
        self._lease_s = welcome.lease_ms / 1000
        self._on_beat(self._lease_s)
        self._welcome.put(welcome)

    def _watch(self, now: float) -> None:
        if self._parent_pid and os.getppid() != self._parent_pid:
            self._end(Detached("the server that started this worker is gone"))
        if self._is_attached and now - self._last_heard > self._lease_s:
            self._end(Detached(f"the server has been silent for {now - self._last_heard:.1f} s"))
        if now > self._force_exit_at:
            logger.error("still busy %.0f s after it was detached: exiting at once", FORCED_EXIT_S)
            os._exit(DETACHED_EXIT_CODE)

    def _end(self, error: TxError) -> None:
        if self._force_exit_at == float("inf"):
            self._force_exit_at = time.monotonic() + FORCED_EXIT_S
            self.stop(error)


def _get(items: queue.SimpleQueue[T]) -> T:
    """The next item. It wakes regularly: a signal that comes just before a thread waits is handled when that wakes."""
    while True:
        with contextlib.suppress(queue.Empty):
            return items.get(timeout=SIGNAL_POLL_S)
