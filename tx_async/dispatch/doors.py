"""The doors through which workers come: ZeroMQ sockets on the event loop's thread, read in callbacks that never await.

`router.py` decides what a message means and who is behind a connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import zmq

from tx_async.dispatch.frames import MESSAGE_BYTES_MAX, Block, EnvelopeToWorker, encode
from tx_async.dispatch.security import secure_server
from tx_async.errors import ConfigError
from tx_async.wire.worker import ToWorker

MESSAGES_PER_TURN_MAX = 256
"""How many messages are read before other tasks of the event loop get their turn."""
CLOSE_LINGER_MS = 200

Peer = tuple[str, bytes]
"""The door ("ipc" or "tcp"), and the connection's name there."""
Frames = Sequence[bytes | memoryview]


class Doors:
    def __init__(self, on_frames: Callable[[Peer, Frames], None], on_error: Callable[[Exception], None]):
        """on_frames: called with each message that arrived. on_error: called with what that call raised."""
        self._on_frames = on_frames
        self._on_error = on_error
        self._context: zmq.Context | None = None
        self._sockets: dict[str, zmq.Socket] = {}
        self._is_drain_due = False

    def open_for_host(self, address: str) -> None:
        """Open the door for workers on this host. Raises `ConfigError` when the address cannot be bound."""
        self._bind("ipc", address, self._new_socket("ipc"))

    def open_for_network(self, address: str, token: str) -> None:
        """Open the door for whoever knows the token. Raises `ConfigError` when the address cannot be bound, or would
        let anybody in."""
        if not address.startswith("tcp://"):
            raise ConfigError(f"worker_address is {address!r}; it must look like tcp://0.0.0.0:7001.")
        socket = self._new_socket("tcp")
        secure_server(socket, token)
        self._bind("tcp", address, socket)

    def _new_socket(self, transport: str) -> zmq.Socket:
        self._context = self._context or zmq.Context(io_threads=1)
        socket = self._sockets[transport] = self._context.socket(zmq.ROUTER)
        socket.linger = CLOSE_LINGER_MS
        socket.router_mandatory = True
        socket.maxmsgsize = MESSAGE_BYTES_MAX
        return socket

    def _bind(self, transport: str, address: str, socket: zmq.Socket) -> None:
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"Workers cannot attach at {address}: {error}.") from error
        asyncio.get_running_loop().add_reader(socket.fd, self.drain)  # type: ignore[arg-type]

    def address_of(self, transport: str) -> str:
        """The address of a door, with the real port; "" while that door is shut."""
        socket = self._sockets.get(transport)
        return socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0") if socket else ""

    def close(self) -> None:
        loop = asyncio.get_running_loop()
        for socket in self._sockets.values():
            loop.remove_reader(socket.fd)  # type: ignore[arg-type]
            socket.close()
        self._sockets.clear()
        if self._context is not None:
            self._context.term()
            self._context = None

    def post(
        self,
        peer: Peer,
        message: ToWorker,
        block: Block | None = None,
        released: tuple[int, ...] = (),
        frame: memoryview | None = None,
    ) -> bool:
        """Send one message. False when nobody is at the other end, or the other end accepts nothing any more."""
        transport, identity = peer
        parts = [identity, encode(EnvelopeToWorker(message, block, released))]
        if frame is not None:
            parts.append(frame)  # type: ignore[arg-type]
        try:
            self._sockets[transport].send_multipart(parts, zmq.DONTWAIT, copy=frame is None)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        # Sending may swallow the edge that announces an arrived message: look again.
        self._drain_soon()
        return True

    def drain(self) -> None:
        """Read what has arrived."""
        self._is_drain_due = False
        try:
            for transport, socket in self._sockets.items():
                self._drain_socket(transport, socket)
        except Exception as error:
            self._on_error(error)

    def _drain_soon(self) -> None:
        if not self._is_drain_due:
            self._is_drain_due = True
            asyncio.get_running_loop().call_soon(self.drain)

    def _drain_socket(self, transport: str, socket: zmq.Socket) -> None:
        for _ in range(MESSAGES_PER_TURN_MAX):
            try:
                identity = socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            frames: list[bytes | memoryview] = []
            while socket.rcvmore:
                # Copying the small header is cheaper than keeping its frame; the tensors that follow it are not copied.
                frames.append(socket.recv(zmq.DONTWAIT, copy=False).buffer if frames else socket.recv(zmq.DONTWAIT))
            self._on_frames((transport, identity), frames)
        self._drain_soon()
