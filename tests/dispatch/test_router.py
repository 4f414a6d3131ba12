"""The router against dealers in the same process: protocol, order, leases, strangers. Real processes: tests/worker."""
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import asyncio
import contextlib
import os
import random
import shutil
import tempfile

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from tx_async.config import ServerConfig
from tx_async.dispatch import dealer as dealer_module
from tx_async.dispatch.dealer import Dealer, Detached, StreamDiverged
from tx_async.dispatch.frames import (
    IN_FRAME,
    Block,
    EnvelopeFromWorker,
    EnvelopeToWorker,
    decode_to_worker,
    encode,
    layout,
    specs_of,
)
from tx_async.dispatch.router import Router
from tx_async.errors import ConfigError, EngineError, NotReady, WorkerRefused
from tx_async.testing.dispatch import until
from tx_async.testing.fake_engine import FakeEngine
from tx_async.wire.facts import CommandEnded, WorkerLost, WorkerProgress, WorkerReady
from tx_async.wire.worker import (
    PROTOCOL_VERSION,
    CancelSequences,
    CommandFailed,
    CommandFinished,
    Done,
    EngineConfig,
    Goodbye,
    Heartbeat,
    Hello,
    NumberedCommand,
    Ready,
    Refused,
    ReleaseAdapter,
    Trained,
    Welcome,
    command_digest,
)

INFO = FakeEngine().info()
TOKEN = "a token that nobody guesses"
BIG = np.arange(100_000, dtype=np.float32)
SMALL = np.arange(10, dtype=np.int32)


class StillClock:
    """Time that passes only when a test says so."""

    def __init__(self):
        self.time = 1000.0

    def now(self):
        return self.time

    def monotonic(self):
        return self.time


class Server:
    def __init__(self, router, events):
        self.router = router
        self.events = events
        self.dealers = []

    async def event(self, kind):
        async with asyncio.timeout(10):
            while isinstance(event := await self.events.get(), WorkerProgress) and kind is not WorkerProgress:
                pass
        assert isinstance(event, kind), event
        return event

    async def finished(self):
        ended = await self.event(CommandEnded)
        assert ended.failure is None, ended
        return ended

    async def attach(self, **options):
        dealer = Dealer(options.pop("connect", self.router.address), **options)
        self.dealers.append(dealer)
        return dealer, await asyncio.to_thread(dealer.attach)

    async def attach_ready(self, **options):
        dealer, _ = await self.attach(**options)
        dealer.ready(INFO)
        await self.event(WorkerReady)
        return dealer


@contextlib.asynccontextmanager
async def running_server(clock=None, **config):
    config = {"worker_heartbeat_interval_ms": 50, "data_dir": "/nowhere", **config}
    events = asyncio.Queue()
    router = Router(ServerConfig(**config), events.put_nowait, clock=clock)
    await router.start()
    task = asyncio.create_task(router.run())
    server = Server(router, events)
    try:
        yield server
    finally:
        # A dealer that nobody closes ends its process when its lease is over: that would be the test run.
        for dealer in server.dealers:
            dealer.close()
        await router.stop()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def server():
    async with running_server() as server:
        yield server


@contextlib.contextmanager
def raw_connection(address):
    """A peer that says what it likes."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.rcvtimeo = 5000
    socket.connect(address)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


def hello(**fields):
    values = {"protocol_version": PROTOCOL_VERSION, "name": "w0", "host": "here", "pid": os.getpid(), **fields}
    return Hello(**values)


def say(socket, message, block=None, *frames):
    socket.send_multipart([encode(EnvelopeFromWorker(message, block)), *frames])


async def hear(socket):
    header, *_ = await asyncio.to_thread(socket.recv_multipart)
    return decode_to_worker(header).message


# ---- the usual course


async def test_a_worker_attaches_works_and_leaves(server):
    dealer, welcome = await server.attach()
    assert welcome.process_id == 0 and welcome.lease_ms == server.router.config.worker_lease_ms
    assert server.router.waiting_for() == ["worker w0.0: starting"]
    dealer.progress("loading weights", 2, 5)
    progress = await server.event(WorkerProgress)
    assert (progress.stage, progress.done, progress.total) == ("loading weights", 2.0, 5.0)
    assert server.router.waiting_for() == ["worker w0.0: loading weights 40 %"]
    dealer.ready(INFO)
    ready = await server.event(WorkerReady)
    assert ready == WorkerReady("w0", INFO, frozenset({"train", "sample", "score"}))
    assert server.router.waiting_for() == []

    number = server.router.send("w0", ReleaseAdapter(slot=3), [BIG, SMALL])
    received = await asyncio.to_thread(dealer.receive)
    assert (received.number, received.command) == (number, ReleaseAdapter(slot=3)) == (1, ReleaseAdapter(slot=3))
    np.testing.assert_array_equal(received.tensors[0], BIG)
    np.testing.assert_array_equal(received.tensors[1], SMALL)
    dealer.reply(number, Trained(), [BIG * 2])
    finished = await server.finished()
    assert (finished.worker_id, finished.number, finished.result) == ("w0", 1, Trained())
    np.testing.assert_array_equal(finished.tensors[0], BIG * 2)
    assert finished.outcome.elapsed_ms > 0

    dealer.goodbye("tired")
    assert "tired" in (await server.event(WorkerLost)).reason
    dealer.close()
    with pytest.raises(NotReady):
        server.router.send("w0", ReleaseAdapter(slot=3))


@pytest.mark.parametrize("tensors", [[], [SMALL], [BIG], [SMALL, BIG, SMALL], [np.zeros((0, 3), np.float32)]])
@pytest.mark.parametrize("shared_memory_bytes", [0, 1 << 20])
async def test_tensors_travel_in_both_directions(tensors, shared_memory_bytes):
    async with running_server(shared_memory_bytes=shared_memory_bytes) as server:
        dealer = await server.attach_ready()
        number = server.router.send("w0", ReleaseAdapter(slot=0), tensors)
        received = await asyncio.to_thread(dealer.receive)
        dealer.reply(number, Trained(), received.tensors)
        finished = await server.finished()
        for before, after in zip(tensors, finished.tensors, strict=True):
            np.testing.assert_array_equal(before, after)
            assert (before.dtype, before.shape) == (after.dtype, after.shape)
        if shared_memory_bytes == 0 or not any(tensor is BIG for tensor in tensors):
            assert server.router.statistics().shared_bytes == 0
        else:
            assert server.router.statistics().frame_bytes == 0


async def test_ten_thousand_commands_stay_in_order(server):
    """Sizes vary: some pass through shared memory and some beside it. Results are released late and out of order."""
    dealer = await server.attach_ready()
    total, choose = 10_000, random.Random(3)
    sizes = [choose.choice([0, 5, 20_000]) for _ in range(total)]

    def work():
        for received in dealer.commands():
            assert received.command == CancelSequences(sequence_ids=(received.number,))
            dealer.reply(received.number, Done(), received.tensors)
            if received.number == total:
                return

    worker = asyncio.create_task(asyncio.to_thread(work))
    held, sent = [], 0
    for number in range(1, total + 1):
        while sent < min(total, number + 3):
            tensors = [np.full(sizes[sent], sent + 1, np.int32)] if sizes[sent] else []
            sent += 1
            assert server.router.send("w0", CancelSequences(sequence_ids=(sent,)), tensors) == sent
        finished = await server.finished()
        assert finished.number == number
        held.append(finished)
        if len(held) > 5:
            oldest = held.pop(choose.randrange(len(held)))
            if oldest.tensors:
                tensor = oldest.tensors[0]
                assert len(tensor) == sizes[oldest.number - 1] and (tensor == oldest.number).all()
            oldest.release()
    await worker
    statistics = server.router.statistics()
    assert statistics.arena_used_bytes == 0 and statistics.commands_in_flight == 0
    assert statistics.shared_bytes > 0 and statistics.frame_bytes > 0


async def test_a_full_arena_is_gone_around_by_frames():
    """Commands that nobody answers fill the arena; the next ones travel as frames, and all arrive whole."""
    async with running_server(shared_memory_bytes=1 << 20) as server:
        dealer = await server.attach_ready()
        for index in range(6):
            server.router.send("w0", ReleaseAdapter(slot=index), [BIG + index])
        for index in range(6):
            received = await asyncio.to_thread(dealer.receive)
            np.testing.assert_array_equal(received.tensors[0], BIG + index)
        assert server.router.statistics().arena_full == 4
        for number in range(1, 7):
            dealer.reply(number, Trained(), [BIG + number])
        results = [await server.finished() for _ in range(6)]
        for number, finished in enumerate(results, 1):
            np.testing.assert_array_equal(finished.tensors[0], BIG + number)


async def test_released_memory_goes_back_to_the_worker_without_further_commands():
    async with running_server(shared_memory_bytes=1 << 20) as server:
        dealer = await server.attach_ready()
        for _ in range(8):  # each takes 400 kB of the 1 MiB
            number = server.router.send("w0", ReleaseAdapter(slot=0))
            await asyncio.to_thread(dealer.receive)
            dealer.reply(number, Trained(), [BIG])
            finished = await server.finished()
            finished.release()
            finished.release()
            await until(lambda: dealer._outbox.used_bytes == 0)
        assert server.router.statistics().frame_bytes == 0


async def test_one_error_fails_one_command(server):
    dealer = await server.attach_ready()
    for _ in range(2):
        server.router.send("w0", ReleaseAdapter(slot=0))
        await asyncio.to_thread(dealer.receive)
    dealer.fail(1, EngineError("not this one"))
    dealer.reply(2, Done())
    failed = CommandFailed(number=1, category="server", message="not this one", error="EngineError")
    ended = await server.event(CommandEnded)
    assert (ended.worker_id, ended.failure) == ("w0", failed)
    assert (await server.finished()).number == 2


async def test_a_fatal_error_loses_the_worker(server):
    dealer = await server.attach_ready()
    server.router.send("w0", ReleaseAdapter(slot=0))
    await asyncio.to_thread(dealer.receive)
    dealer.fail(1, ZeroDivisionError("by zero"), fatal=True)
    failed = CommandFailed(number=1, category="server", message="ZeroDivisionError: by zero", fatal=True)
    assert await server.event(CommandEnded) == CommandEnded("w0", failed)
    assert "ZeroDivisionError" in (await server.event(WorkerLost)).reason


async def test_a_worker_that_only_samples_stands_beside_a_mesh_that_is_not_complete():
    async with running_server(backend_config=EngineConfig(num_processes=2)) as server:
        half, _ = await server.attach(process_id=1)
        sampler, _ = await server.attach(name="external", capabilities=frozenset({"sample"}))
        half.ready(INFO)
        await until(lambda: server.router.is_member_ready("w0", 1))
        sampler.ready(INFO)
        assert await server.event(WorkerReady) == WorkerReady("external", INFO, frozenset({"sample"}))
        assert server.router.waiting_for() == ["worker w0.0: not attached"]
        assert server.router.send("external", ReleaseAdapter(slot=0)) == 1


# ---- the door


async def test_another_protocol_version_is_refused_with_the_reason_on_both_sides(server, monkeypatch, caplog):
    monkeypatch.setattr("tx_async.dispatch.dealer.PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    with pytest.raises(WorkerRefused, match="same release"):
        await server.attach()
    assert "same release" in caplog.text
    assert server.router.statistics().workers_refused == 1


async def test_processes_that_loaded_different_models_are_refused_with_the_reason_on_both_sides(caplog):
    """A mesh would compute with half of the one and half of the other."""
    async with running_server(backend_config=EngineConfig(num_processes=2)) as server:
        dealers = []
        for process_id, digest in enumerate(("a" * 32, "b" * 32)):
            dealer, _ = await server.attach(process_id=process_id)
            dealer.ready(msgspec.structs.replace(INFO, base_model_digest=digest))
            dealers.append(dealer)
        for dealer in dealers:
            with pytest.raises(Detached, match=r"base_model_digest is a+ in process 0, b+ in process 1"):
                await asyncio.to_thread(dealer.receive)
            dealer.close()
        assert "base_model_digest is aaa" in caplog.text
        assert not server.router.is_ready("w0")


@pytest.mark.parametrize("process_id", [-1, 1, 2**40])
async def test_a_process_id_out_of_range_is_refused(server, process_id):
    with raw_connection(server.router.address) as socket:
        say(socket, hello(process_id=process_id))
        answer = await hear(socket)
    assert isinstance(answer, Refused) and "counted from 0" in answer.reason


async def test_a_process_id_is_given_once(server, caplog):
    first = await server.attach_ready()
    with pytest.raises(WorkerRefused, match="attached already"):
        await server.attach()
    assert "attached already" in caplog.text
    server.router.send("w0", ReleaseAdapter(slot=0))
    assert (await asyncio.to_thread(first.receive)).number == 1


async def test_a_new_process_takes_the_place_of_a_dead_one_at_once(server):
    """Its lease has a minute to run, but nobody is at the other end of its connection."""
    with raw_connection(server.router.address) as socket:
        say(socket, hello(pid=1))
        assert isinstance(await hear(socket), Welcome)
    await asyncio.sleep(0.1)
    await server.attach_ready()


async def test_a_tcp_door_without_a_good_token_is_not_opened():
    for token in ("", "short"):
        with pytest.raises(ConfigError, match="worker_token"):
            async with running_server(worker_address="tcp://127.0.0.1:*", worker_token=token):
                pass


@pytest.mark.parametrize("address", ["127.0.0.1:7001", "tcp://256.0.0.1:x"])
async def test_an_impossible_address_is_a_configuration_error(address):
    with pytest.raises(ConfigError):
        async with running_server(worker_address=address, worker_token=TOKEN):
            pass


async def test_a_lease_shorter_than_its_heartbeats_is_a_configuration_error():
    with pytest.raises(ConfigError, match="worker_lease_ms"):
        async with running_server(worker_lease_ms=100):
            pass


async def test_tcp_workers_know_the_token():
    async with running_server(worker_address="tcp://127.0.0.1:*", worker_token=TOKEN) as server:
        dealer = await server.attach_ready(connect=server.router.tcp_address, token=TOKEN)
        server.router.send("w0", ReleaseAdapter(slot=0), [BIG])
        received = await asyncio.to_thread(dealer.receive)
        np.testing.assert_array_equal(received.tensors[0], BIG)
        dealer.reply(1, Trained(), [BIG])
        np.testing.assert_array_equal((await server.finished()).tensors[0], BIG)


async def test_without_the_token_a_tcp_peer_is_told_nothing():
    async with running_server(worker_address="tcp://127.0.0.1:*", worker_token=TOKEN) as server:
        with raw_connection(server.router.tcp_address) as plain:
            plain.rcvtimeo = 300
            say(plain, hello(token=TOKEN))
            with pytest.raises(zmq.Again):
                await hear(plain)
        with Dealer(server.router.tcp_address, token=TOKEN + "?") as stranger:
            attaching = asyncio.create_task(asyncio.to_thread(stranger.attach))
            await asyncio.sleep(0.5)
            assert not attaching.done()
            stranger.stop()
            with pytest.raises(Detached):
                await attaching
        assert server.router.statistics().workers_attaching == 0


async def test_the_socket_file_is_private_and_goes_with_the_server():
    async with running_server() as server:
        folder = server.router.runtime.path
        assert (folder / "worker.sock").is_socket() and folder.stat().st_mode & 0o077 == 0
        dealer = await server.attach_ready()
        assert len(list(folder.glob("arena-*"))) == 2
        dealer.goodbye()
        await server.event(WorkerLost)
        assert list(folder.glob("arena-*")) == []
        dealer.close()
    assert not folder.exists()


# ---- losing workers


async def test_a_silent_worker_is_lost_when_its_lease_ends():
    clock = StillClock()
    async with running_server(clock, worker_lease_ms=60_000, worker_heartbeat_interval_ms=20_000) as server:
        with raw_connection(server.router.address) as socket:
            say(socket, hello())
            await hear(socket)
            say(socket, Ready(info=INFO))
            await server.event(WorkerReady)
            clock.time += 30
            server.router.check_leases()
            assert server.router.silence() == {}
            clock.time += 30
            server.router.check_leases()
            assert server.router.is_ready("w0")
            assert server.router.silence() == {"w0": "worker w0.0: silent for 60 s"}, "long before it is lost"
            clock.time += 0.1
            server.router.check_leases()
            assert "silent for 60.1 s" in (await server.event(WorkerLost)).reason
            # It was only slow, and comes back: it hears that it must start again.
            assert isinstance(await hear(socket), Heartbeat)  # the server's question after the first 60 s
            assert "starts again" in (await hear(socket)).reason
            say(socket, Heartbeat())
            assert "attach again" in (await hear(socket)).reason


async def test_a_broken_connection_is_noticed_long_before_the_lease_ends(server):
    with raw_connection(server.router.address) as socket:
        say(socket, hello())
        await hear(socket)
        say(socket, Ready(info=INFO))
        await server.event(WorkerReady)
    assert "connection" in (await server.event(WorkerLost)).reason


async def test_a_server_that_was_stopped_itself_does_not_blame_its_workers():
    """After a minute of SIGSTOP, heartbeats of a minute ago are the newest it can know."""
    clock = StillClock()
    async with running_server(clock, worker_lease_ms=2_000) as server:
        await server.attach_ready()
        clock.time += 60
        await asyncio.sleep(0.3)
        assert server.router.is_ready("w0")


async def test_a_dealer_notices_a_silent_server(monkeypatch):
    monkeypatch.setattr(dealer_module, "FORCED_EXIT_S", float("inf"))
    async with running_server(worker_lease_ms=2_000) as server:
        dealer = await server.attach_ready()
        monkeypatch.setattr(server.router, "_send", lambda *_, **__: None)
        with pytest.raises(Detached, match="silent"):
            await asyncio.wait_for(asyncio.to_thread(dealer.receive), 30)


async def test_what_is_in_flight_is_lost_with_its_worker_and_numbers_begin_again(server):
    dealer = await server.attach_ready()
    server.router.send("w0", ReleaseAdapter(slot=0), [BIG])
    dealer.goodbye()
    await server.event(WorkerLost)
    dealer.close()
    await server.attach_ready()
    assert server.router.send("w0", ReleaseAdapter(slot=0)) == 1
    assert server.router.statistics().commands_in_flight == 1


# ---- a stream that is not what it should be


async def test_workers_say_how_many_they_are_where_the_settings_do_not(server):
    """As Slurm, Kubernetes or MPI has started them: the server is told neither their number nor the coordinator."""
    place = {"num_processes": 2, "coordinator_address": "gpu07:61440"}
    second, welcome = await server.attach(process_id=1, **place)
    assert (welcome.engine.num_processes, welcome.engine.coordinator_address) == (2, "gpu07:61440")
    with pytest.raises(WorkerRefused, match="2 processes"):
        await server.attach(process_id=2, num_processes=3)
    first, _ = await server.attach(process_id=0, **place)
    for dealer in (first, second):
        dealer.ready(INFO)
    await server.event(WorkerReady)


async def test_settings_that_say_another_number_are_not_overruled():
    async with running_server(backend_config=EngineConfig(num_processes=2, coordinator_address="a:1")) as server:
        with pytest.raises(WorkerRefused, match="one of 4 processes"):
            await server.attach(process_id=0, num_processes=4)
        _, welcome = await server.attach(process_id=0, num_processes=2, coordinator_address="b:2")
        assert (welcome.engine.num_processes, welcome.engine.coordinator_address) == (2, "a:1")


async def attach_raw(server, socket):
    say(socket, hello())
    await hear(socket)
    say(socket, Ready(info=INFO))
    await server.event(WorkerReady)


@pytest.mark.parametrize(
    "fault",
    [
        "unknown number",
        "number twice",
        "block outside",
        "no block",
        "block of another size",
        "negative shape",
        "garbage",
    ],
)
async def test_an_answer_that_cannot_be_right_loses_the_worker(server, fault):
    specs = specs_of([SMALL])
    _, num_bytes = layout(specs)
    with raw_connection(server.router.address) as socket:
        await attach_raw(server, socket)
        server.router.send("w0", ReleaseAdapter(slot=0))
        await hear(socket)
        good = CommandFinished(number=1, result=Trained(), elapsed_ms=1.0, tensors=specs)
        match fault:
            case "unknown number":
                say(socket, CommandFinished(number=2, result=Done(), elapsed_ms=1.0))
            case "number twice":
                say(socket, CommandFinished(number=1, result=Done(), elapsed_ms=1.0))
                await server.finished()
                say(socket, CommandFinished(number=1, result=Done(), elapsed_ms=1.0))
            case "block outside":
                say(socket, good, Block(1 << 40, num_bytes))
            case "no block":
                say(socket, good)
            case "block of another size":
                say(socket, good, Block(IN_FRAME, num_bytes), b"x" * (num_bytes - 1))
            case "negative shape":
                say(socket, good, Block(0, -64))
            case "garbage":
                socket.send(b"\xff\x00garbage")
        assert "malformed" in (await server.event(WorkerLost)).reason


async def test_a_gap_in_the_numbers_stops_a_worker():
    with raw_server() as (address, answer), Dealer(address) as dealer:
        await attach_to_raw_server(dealer, answer)
        command = ReleaseAdapter(slot=0)
        answer(NumberedCommand(number=2, digest=command_digest(2, command, ()), command=command))
        with pytest.raises(StreamDiverged, match="Command 2 arrived, 1 is next"):
            await asyncio.to_thread(dealer.receive)


async def test_another_digest_stops_a_worker_and_both_are_named():
    with raw_server() as (address, answer), Dealer(address) as dealer:
        await attach_to_raw_server(dealer, answer)
        theirs = command_digest(1, ReleaseAdapter(slot=1), ())
        answer(NumberedCommand(number=1, digest=theirs, command=ReleaseAdapter(slot=0)))
        with pytest.raises(StreamDiverged) as raised:
            await asyncio.to_thread(dealer.receive)
        assert theirs in raised.value.message
        assert command_digest(1, ReleaseAdapter(slot=0), ()) in raised.value.message


@contextlib.contextmanager
def raw_server():
    """A ROUTER whose test says what it sends."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.linger = 0
    folder = tempfile.mkdtemp(prefix="tx")
    address = f"ipc://{folder}/worker.sock"
    socket.bind(address)
    identity = []

    def answer(message):
        if not identity:
            identity.append(socket.recv_multipart()[0])
        socket.send_multipart([identity[0], encode(EnvelopeToWorker(message))])

    try:
        yield address, answer
    finally:
        socket.close()
        context.term()
        shutil.rmtree(folder)


async def attach_to_raw_server(dealer, answer):
    attaching = asyncio.create_task(asyncio.to_thread(dealer.attach))
    await asyncio.to_thread(
        answer,
        Welcome(base_model="", engine=EngineConfig(), checkpoints_base="", heartbeat_interval_ms=1000, lease_ms=60_000),
    )
    await attaching


# ---- strangers


messages = st.one_of(
    st.binary(max_size=64),
    st.builds(lambda message: encode(EnvelopeFromWorker(message)), st.sampled_from(
        [Heartbeat(), Goodbye(), Ready(info=INFO), CommandFinished(number=1, result=Done(), elapsed_ms=0.0)])),
    st.builds(lambda **fields: encode(EnvelopeFromWorker(hello(**fields))), name=st.text(max_size=3),
              process_id=st.integers(-5, 5), protocol_version=st.integers(0, 2), token=st.text(max_size=5),
              capabilities=st.frozensets(st.sampled_from(["train", "sample"]))),
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed():
    """A running router on a loop of its own, with one honest worker."""
    with asyncio.Runner() as runner:
        manager = running_server(worker_heartbeat_interval_ms=1000)
        server = runner.run(manager.__aenter__())
        dealer = runner.run(server.attach_ready(name="honest"))
        yield runner, server, dealer
        dealer.close()
        runner.run(manager.__aexit__(None, None, None))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(messages, min_size=1, max_size=3), max_size=6))
def test_strangers_cannot_disturb_anybody(fuzzed, conversation):
    runner, server, dealer = fuzzed

    async def run():
        with raw_connection(server.router.address) as socket:
            for frames in conversation:
                socket.send_multipart(frames)
            number = server.router.send("honest", ReleaseAdapter(slot=0), [SMALL])
            received = await asyncio.to_thread(dealer.receive)
            assert received.number == number
            dealer.reply(number, Done())
            while not isinstance(event := await asyncio.wait_for(server.events.get(), 5), CommandEnded):
                assert getattr(event, "worker_id", None) != "honest", event
            assert event.number == number and event.failure is None

    runner.run(run())
