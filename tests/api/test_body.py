"""Bodies as they come over a real connection: half-sent, packed, endless; of which none holds anything for long."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import zstandard
from hypercorn.asyncio import serve
from hypercorn.config import Config

from tests.api.test_integers import message
from tx_async.api.routes import create_api
from tx_async.config import ServerConfig
from tx_async.testing.fake_scheduler import FakeScheduler
from tx_async.testing.server import free_port

SETTINGS = {"body_timeout_ms": 150, "bodies_bytes_max": 2**23, "tenant_bodies_bytes_max": 2**22}


class Wire:
    """One connection, and what comes back on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    async def send(self, path: str, *headers: str, body: bytes = b"") -> None:
        lines = [f"POST /api/v1/{path} HTTP/1.1", "host: test", "x-api-key: tml-a", *headers]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """Status and everything until the server closes, or the whole answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(head.split()[1]), head + await self.reader.readexactly(length)

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    async def is_closed(self) -> bool:
        return await self.reader.read(1) == b""


Connect = Callable[[], Awaitable[Wire]]


@asynccontextmanager
async def served(scheduler: FakeScheduler) -> AsyncIterator[Connect]:
    config, stop, port = Config(), asyncio.Event(), free_port()
    config.bind = [f"127.0.0.1:{port}"]
    config.graceful_timeout = 0.1
    app = create_api(scheduler, ServerConfig(**SETTINGS), scheduler.files)
    task = asyncio.create_task(serve(app, config, shutdown_trigger=stop.wait))  # type: ignore[arg-type]
    while True:
        try:
            await Wire(*await asyncio.open_connection("127.0.0.1", port)).close()
            break
        except OSError:
            await asyncio.sleep(0.01)
    wires: list[Wire] = []

    async def connect() -> Wire:
        wires.append(Wire(*await asyncio.open_connection("127.0.0.1", port)))
        return wires[-1]

    yield connect
    for wire in wires:
        await wire.close()
    stop.set()
    await task


@pytest.mark.parametrize("path", ["forward_backward", "create_session", "asample"])
@pytest.mark.parametrize("length", ["content-length: 1000000", "transfer-encoding: chunked"])
async def test_a_body_that_stands_still_is_cut_and_its_connection_closed(path: str, length: str):
    async with served(FakeScheduler()) as connect:
        wire = await connect()
        await wire.send(path, length, "content-type: application/json")
        status, answer = await wire.answer()
        assert status == 408 and b"body_timeout_ms" in answer
        assert await wire.is_closed()


async def test_half_sent_bodies_hold_their_bytes_until_they_are_cut_and_no_longer():
    """They announce more than their key may have together: those that wait are served when the first ones are cut."""
    async with served(FakeScheduler()) as connect:
        halves = [await connect() for _ in range(4)]
        for wire in halves:
            await wire.send("forward_backward", f"content-length: {2**20}", body=b"\0" * 1000)
        whole = await connect()
        body = b"\0" * 2**20
        await whole.send("forward_backward", f"content-length: {len(body)}", "content-type: application/x-protobuf")
        whole.writer.write(body)
        assert (await whole.answer())[0] == 400
        assert [(await wire.answer())[0] for wire in halves] in ([408] * 4, [408] * 3 + [429])


async def test_what_nobody_wants_of_a_body_leaves_no_reader_behind():
    """Its answer was there before it had come; the task that reads the connection must not wait for ever."""
    async with served(FakeScheduler()) as connect:
        before = len(asyncio.all_tasks())
        for _ in range(5):
            wire = await connect()
            await wire.send("telemetry", "content-length: 4000000")
            wire.writer.write(b" " * 4_000_000)
            assert (await wire.answer())[0] == 200
            await wire.close()
        async with asyncio.timeout(10):
            while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_a_connection_goes_on_after_a_body_that_nobody_wants():
    """Its answer used to overtake it now and then, and then the connection was closed under the next request."""
    async with served(FakeScheduler()) as connect:
        wire = await connect()
        for _ in range(10):
            await wire.send("telemetry", "content-length: 600000", body=b" " * 600_000)
            assert (await wire.answer())[0] == 200
        endless = await connect()
        await endless.send("telemetry", "content-length: 600000", body=b" ")
        status, answer = await endless.answer()
        assert status == 200 and b"connection: close" in answer.lower() and await endless.is_closed()


@pytest.mark.parametrize("announces", [True, False])
async def test_what_a_packed_body_unfolds_to_is_asked_for_before_it_is_there(announces: bool):
    bomb = zstandard.ZstdCompressor(write_content_size=announces).compress(b"\0" * 2**26)
    honest = message("m")
    honest.data[0].loss_fn_inputs["unused"].dense = b"\0" * 2**20  # compresses very well, and is fine
    content = zstandard.ZstdCompressor(write_content_size=announces).compress(honest.SerializeToString())
    assert len(content) < 2000
    async with served(FakeScheduler()) as connect:
        for body, expected in ((bomb, 413), (content, 404)):  # 404: there is no such model
            wire = await connect()
            headers = (f"content-length: {len(body)}", "content-encoding: zstd", "content-type: application/x-protobuf")
            await wire.send("forward_backward", *headers, body=body)
            status, answer = await wire.answer()
            assert status == expected, answer
