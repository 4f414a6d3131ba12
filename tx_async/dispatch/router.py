"""The server's end: attaches workers, numbers their commands, and turns what they say into facts.

Everything happens on the event loop's thread, in callbacks that never await: when a socket becomes readable, a timer
fires or the scheduler calls `send`. What happened is reported to one callback as a fact (`wire/facts.py`).

It has two doors. A socket file in a folder that only this user can enter is always open, for workers on this host; a
tcp port is open only when configured, and only to peers that know the token. A worker that is lost, or whose connection
is lost, is never taken back into its stream: it starts again from Hello, with an empty engine, and so does every other
process of its mesh.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Container, Sequence

import numpy as np

from tx_async.clock import Clock, SystemClock
from tx_async.config import ServerConfig
from tx_async.dispatch import attaching
from tx_async.dispatch.blocks import BlockTransport
from tx_async.dispatch.doors import Doors, Frames, Peer
from tx_async.dispatch.frames import (
    IN_FRAME,
    Block,
    EnvelopeFromWorker,
    MalformedMessage,
    decode_from_worker,
    layout,
    pack_block,
    specs_of,
)
from tx_async.dispatch.groups import Group, InFlight, Member, Outcome
from tx_async.dispatch.runtime import RuntimeDirectory
from tx_async.dispatch.statistics import RouterStatistics, Totals, WorkerStatistics, statistics_of, worker_statistics_of
from tx_async.errors import NotReady
from tx_async.wire.facts import CommandEnded, WorkerFact, WorkerLost, WorkerProgress, WorkerReady
from tx_async.wire.worker import (
    Command,
    CommandFailed,
    CommandFinished,
    Goodbye,
    Heartbeat,
    Hello,
    NumberedCommand,
    Progress,
    Ready,
    Refused,
    Shutdown,
    StorageProbe,
    ToWorker,
    command_digest,
)

logger = logging.getLogger(__name__)

GROUPS_MAX = 256


class Router:
    """The actor that the module describes: `start` it, `run` it in a task of the server's group, then `stop` it."""

    name = "router"

    def __init__(
        self,
        config: ServerConfig,
        tell: Callable[[WorkerFact], None],
        storage_probe: StorageProbe | None = None,
        *,
        clock: Clock | None = None,
        runtime: RuntimeDirectory | None = None,
    ):
        self.config = config
        self.storage_probe = storage_probe
        #: identities of the storage and the base model, as the journal knows them; "" while it does not
        self.storage_id = self.base_fingerprint = ""
        self.lora_rank = 0  #: the highest rank that somebody has asked for
        self.clock = clock or SystemClock()
        #: made by `start`, so that a server that never gets that far leaves nothing behind
        self._runtime = runtime
        self._tell = tell
        #: every attached or attaching worker by name; a lost group is removed
        self._groups: dict[str, Group] = {}
        #: connection -> the group and member behind it; exactly the members of `_groups`
        self._peers: dict[Peer, tuple[Group, Member]] = {}
        self._doors = Doors(self.handle_frames, self._fail)
        self._last_tick = 0.0
        self._failure: asyncio.Future[None] | None = None
        self._blocks = BlockTransport()
        self._totals = Totals()
        self._counts = dict.fromkeys(
            ("commands_sent", "results_received", "malformed_messages", "workers_refused", "workers_lost"), 0
        )

    def __repr__(self) -> str:
        return f"<Router {self.statistics()}>"

    def statistics(self) -> RouterStatistics:
        return statistics_of(self._groups.values(), self._counts | self._blocks.counts)

    def worker_statistics(self) -> WorkerStatistics:
        lease_s = self.config.worker_lease_ms / 1000
        return worker_statistics_of(self._groups.values(), self._totals, self.clock.monotonic(), lease_s)

    @property
    def runtime(self) -> RuntimeDirectory:
        assert self._runtime is not None, "start the router first"
        return self._runtime

    @property
    def address(self) -> str:
        """Where workers on this host attach."""
        return f"ipc://{self.runtime.socket}"

    @property
    def tcp_address(self) -> str:
        """Where workers on other hosts attach, with the real port; "" when none may."""
        return self._doors.address_of("tcp")

    # ---- life

    async def start(self) -> None:
        """Open the doors. Raises `ConfigError` when an address cannot be bound, or would let anybody in."""
        config = self.config
        attaching.check_lease(config)
        self._failure = asyncio.get_running_loop().create_future()
        self._runtime = self._runtime or RuntimeDirectory()
        try:
            self._doors.open_for_host(self.address)
            if config.worker_address:
                self._doors.open_for_network(config.worker_address, config.worker_token)
        except BaseException:
            await self.stop()
            raise
        self._last_tick = self.clock.monotonic()

    async def run(self) -> None:
        """Watch over leases until cancelled. Raises the error of any callback in which an invariant broke."""
        assert self._failure is not None, "start the router first"
        while True:
            self._tick()
            done, _ = await asyncio.wait([self._failure], timeout=self.config.worker_heartbeat_interval_ms / 1000)
            if done:
                return self._failure.result()

    async def stop(self) -> None:
        """Tell every worker to finish, and leave nothing behind."""
        for peer in list(self._peers):
            self._doors.post(peer, Shutdown())
        for group in list(self._groups.values()):
            self._forget(group)
        self._doors.close()
        if self._runtime is not None:
            self._runtime.close()

    # ---- for the scheduler

    def send(self, worker_id: str, command: Command, tensors: Sequence[np.ndarray] = ()) -> int:
        """Send a ready worker its next command; the tensors' bytes are copied now. Returns the command's number.

        Raises `NotReady` when the worker is not (or no longer) there. A loss that is noticed only here is reported as a
        fact afterwards, like every other.
        """
        group = self._groups.get(worker_id)
        if group is None or not group.is_ready:
            raise NotReady(f"Worker {worker_id} is not ready.")
        specs = specs_of(tensors)
        offsets, num_bytes = layout(specs)
        shared = self._blocks.write_shared(group, tensors, offsets, num_bytes)
        number = group.take_number(command, shared)
        message = NumberedCommand(
            number=number, digest=command_digest(number, command, specs), command=command, tensors=specs
        )
        self._send_to_all(group, message, shared, tensors)
        self._counts["commands_sent"] += 1
        return number

    def dismiss(self, worker_id: str, reason: str) -> None:
        """Send away a worker that the scheduler rejects. Does nothing when it is gone already."""
        if group := self._groups.get(worker_id):
            for member in group.members.values():
                self._doors.post(member.peer, Refused(reason, is_final=True))
            self._counts["workers_refused"] += 1
            self._lose(group, reason)

    def widen(self, worker_id: str, lora_rank: int) -> None:
        """Have a worker start again with slots for adapters of this rank, which those that attach later get at once."""
        self.lora_rank = max(self.lora_rank, lora_rank)
        if group := self._groups.get(worker_id):
            self._lose(group, f"wider slots are needed, for an adapter of rank {lora_rank}", logging.INFO)

    def process_exited(self, worker_id: str, process_id: int, pid: int, reason: str) -> None:
        """The supervisor saw a worker process end: do not wait for its lease to expire."""
        self._doors.drain()
        if (member := self._member(worker_id, process_id)) and member.hello.pid == pid:
            level = logging.INFO if reason == "exited with code 0" else logging.WARNING
            self._lose(self._groups[worker_id], f"process {process_id} {reason}", level)

    def waiting_for(self, without: Container[tuple[str, int]] = ()) -> list[str]:
        """What workers that have begun to attach still lack, one line for each process that is not in `without`."""
        return [line for group in self._groups.values() if not group.is_ready for line in group.waiting_for(without)]

    def silence(self) -> dict[str, str]:
        """Ready workers with processes that have missed some heartbeats, and are not given up yet -> which."""
        return {name: text for name, group in self._groups.items() if (text := group.silence(self.clock.monotonic()))}

    def member_progress(self, worker_id: str, process_id: int) -> Progress | None:
        member = self._member(worker_id, process_id)
        return member.progress if member else None

    def is_member_ready(self, worker_id: str, process_id: int) -> bool:
        member = self._member(worker_id, process_id)
        return member is not None and member.info is not None

    def _member(self, worker_id: str, process_id: int) -> Member | None:
        group = self._groups.get(worker_id)
        return group.members.get(process_id) if group else None

    def is_ready(self, worker_id: str) -> bool:
        group = self._groups.get(worker_id)
        return group is not None and group.is_ready

    # ---- outwards

    def _send_to_all(
        self, group: Group, message: NumberedCommand, shared: Block | None, tensors: Sequence[np.ndarray]
    ) -> None:
        frame, (offsets, num_bytes) = None, layout(message.tensors)
        for member in list(group.members.values()):
            if not tensors or (shared and member.outbox_path):
                self._send(member, message, shared)
                continue
            if frame is None:
                frame = pack_block(tensors, offsets, num_bytes)
            self._send(member, message, self._blocks.in_frame(num_bytes), frame)

    def _send(
        self, member: Member, message: ToWorker, block: Block | None = None, frame: memoryview | None = None
    ) -> None:
        released = tuple(member.released)
        member.released.clear()
        if not self._doors.post(member.peer, message, block, released, frame):
            asyncio.get_running_loop().call_soon(self._connection_lost, member.peer)

    # ---- inwards

    def _fail(self, error: Exception) -> None:
        """An error of our own making ends `run`, and with it the server."""
        assert self._failure is not None
        if not self._failure.done():
            self._failure.set_exception(error)

    def handle_frames(self, peer: Peer, frames: Frames) -> None:
        """Handle one message, from anybody. Malformed ones are counted; from a member, they also end its group."""
        try:
            if not 1 <= len(frames) <= 2:
                raise MalformedMessage(f"{len(frames)} frames")
            envelope = decode_from_worker(frames[0])
            payload = frames[1] if len(frames) == 2 else None
            self._handle(peer, envelope, payload)
        except MalformedMessage as error:
            self._counts["malformed_messages"] += 1
            logger.debug("malformed message over %s: %s", peer[0], error)
            if known := self._peers.get(peer):
                self._lose(known[0], f"{known[1]} sent a malformed message: {error}")

    def _handle(self, peer: Peer, envelope: EnvelopeFromWorker, payload: bytes | memoryview | None) -> None:
        known = self._peers.get(peer)
        if known is None:
            return self._handle_stranger(peer, envelope.message)
        group, member = known
        member.last_heard = self.clock.monotonic()
        match envelope.message:
            case Heartbeat() as vitals:
                self._totals.hear(member.vitals, vitals)
                member.vitals = vitals
                self._send(member, Heartbeat())
            case CommandFinished() | CommandFailed() as outcome:
                self._handle_outcome(group, member, outcome, envelope.block, payload)
            case Progress() as progress:
                member.progress = progress
                self._tell(WorkerProgress(group.name, progress.stage, progress.done, progress.total))
            case Ready(info=info):
                member.info = info
                self._handle_ready(group)
            case Goodbye(reason=reason):
                self._lose(group, f"{member} left: {reason}" if reason else f"{member} left", logging.INFO)
            case Hello():
                pass  # A worker repeats its Hello until it gets the answer, which is on its way.

    def _handle_stranger(self, peer: Peer, message: object) -> None:
        if isinstance(message, Hello):
            self._attach(peer, message)
        elif not isinstance(message, Goodbye):
            self._doors.post(peer, Refused("The server does not know this connection (any more): attach again."))

    # ---- attaching

    def _attach(self, peer: Peer, hello: Hello) -> None:
        if reason := self._why_refused(peer, hello):
            self._counts["workers_refused"] += 1
            logger.warning("worker %r, process %d (pid %d on %r) was refused: %s",
                           hello.name, hello.process_id, hello.pid, hello.host, reason)  # fmt: skip
            self._doors.post(peer, Refused(reason))
            return
        group = self._groups.get(hello.name)
        if group is None:
            group = self._groups[hello.name] = attaching.new_group(hello, self.config, self.lora_rank)
        transport, identity = peer
        member = Member(identity, transport, hello, self.clock.monotonic())  # type: ignore[arg-type]
        group.members[hello.process_id] = member
        self._peers[peer] = (group, member)
        if hello.shared_memory and transport == "ipc":
            attaching.make_arenas(group, member, self.runtime, self.config.shared_memory_bytes)
        logger.info("worker %s: %s attached over %s", group.name, member, transport)
        self._send(member, attaching.welcome(group, member, self.config, self.storage_probe, self.storage_id))

    def _why_refused(self, peer: Peer, hello: Hello) -> str | None:
        if reason := attaching.why_refused(hello, self.config, is_stranger=peer[0] == "tcp"):
            return reason
        group = self._groups.get(hello.name)
        if group is None:
            return "The server has no room for another worker." if len(self._groups) >= GROUPS_MAX else None
        if reason := attaching.why_no_member(hello, group, self.config):
            return reason
        return self._why_taken(group, hello)

    def _why_taken(self, group: Group, hello: Hello) -> str | None:
        """A new process may take the place of one that has died, not of one that answers."""
        holder = group.members.get(hello.process_id)
        if holder and self._doors.post(holder.peer, Heartbeat()):
            return f"Process {hello.process_id} of worker {group.name} is attached already: {holder}."
        if holder:
            self._lose(group, f"{holder} is gone")
        return None

    def _handle_ready(self, group: Group) -> None:
        if group.is_ready or not group.all_ready:
            return
        infos = [group.members[id].info for id in range(group.num_processes)]
        if reason := attaching.why_unfit(infos, self.base_fingerprint):  # type: ignore[arg-type]
            return self._lose(group, reason)
        group.is_ready = True
        logger.info("worker %s is ready: %s", group.name, attaching.describe(infos[0]))  # type: ignore[arg-type]
        self._tell(WorkerReady(group.name, infos[0], group.capabilities))  # type: ignore[arg-type]

    # ---- results

    def _handle_outcome(
        self, group: Group, member: Member, outcome: Outcome, block: Block | None, payload: bytes | memoryview | None
    ) -> None:
        in_flight = group.in_flight.get(outcome.number)
        process_id = member.hello.process_id
        if in_flight is None or process_id not in in_flight.unanswered:
            raise MalformedMessage(f"an answer to command {outcome.number}, which is not open")
        in_flight.unanswered.discard(process_id)
        in_flight.failed[process_id] = isinstance(outcome, CommandFailed)
        if process_id == 0:
            specs = outcome.tensors if isinstance(outcome, CommandFinished) else ()
            in_flight.tensors = self._blocks.read(member, specs, block, payload)
            in_flight.outcome, in_flight.outcome_block = outcome, block
        if isinstance(outcome, CommandFailed) and outcome.fatal:
            return self._fail_group(group, member, outcome)
        if in_flight.is_complete:
            self._finish(group, outcome.number, in_flight)

    def _finish(self, group: Group, number: int, in_flight: InFlight) -> None:
        del group.in_flight[number]
        if group.inbox and in_flight.block:
            group.inbox.free(in_flight.block.offset)
        if disagreement := in_flight.disagreement:
            return self._lose(group, f"command {number}: {disagreement}")
        self._counts["results_received"] += 1
        assert in_flight.outcome is not None
        release = self._releaser(group.members[0], in_flight.outcome_block)
        self._tell(CommandEnded(group.name, in_flight.outcome, in_flight.tensors, release))

    def _fail_group(self, group: Group, member: Member, failure: CommandFailed) -> None:
        self._tell(CommandEnded(group.name, failure))
        self._lose(group, f"{member} failed at command {failure.number}: {failure.message}")

    def _releaser(self, member: Member, block: Block | None) -> Callable[[], None]:
        if block is None or block.offset == IN_FRAME:
            return lambda: None
        return functools.partial(self._release, member, [block.offset])

    def _release(self, member: Member, once: list[int]) -> None:
        """Tell the member with the next message; if none goes out in this turn of the loop, with one of its own."""
        if not once:
            return
        if not member.released:
            asyncio.get_running_loop().call_soon(self._flush_released, member)
        member.released.append(once.pop())

    def _flush_released(self, member: Member) -> None:
        if member.released and member.peer in self._peers:
            self._send(member, Heartbeat())

    # ---- losing

    def check_leases(self) -> None:
        """Lose every group with a member that has been silent for a lease, or whose connection is gone."""
        now = self.clock.monotonic()
        lease_s, interval_s = self.config.worker_lease_ms / 1000, self.config.worker_heartbeat_interval_ms / 1000
        for peer, (group, member) in list(self._peers.items()):
            silent_s = now - member.last_heard
            if peer not in self._peers:
                continue
            member.notice_silence(now, interval_s, lease_s)
            if silent_s > lease_s:
                self._lose(group, f"{member} has been silent for {silent_s:.1f} s")
            elif silent_s > 1.5 * interval_s and not self._doors.post(peer, Heartbeat()):
                self._lose(group, f"the connection to {member} is gone")

    def _tick(self) -> None:
        now = self.clock.monotonic()
        # If this process itself was stopped for long, its workers are not to blame: they get a fresh lease.
        if now - self._last_tick > self.config.worker_lease_ms / 2000:
            for _, member in self._peers.values():
                member.last_heard = now
        self._last_tick = now
        self._doors.drain()
        self.check_leases()

    def _connection_lost(self, peer: Peer) -> None:
        if known := self._peers.get(peer):
            self._lose(known[0], f"the connection to {known[1]} is gone")

    def _lose(self, group: Group, reason: str, level: int = logging.WARNING) -> None:
        """The group's processes share one mesh, so they fail as one: every other process is told to start again."""
        if self._groups.get(group.name) is not group:
            return
        logger.log(level, "worker %s %s: %s", group.name, "is lost" if level > logging.INFO else "has ended", reason)
        away = Refused(f"worker {group.name} starts again: {reason}", is_meant=level == logging.INFO)
        for member in group.members.values():
            self._doors.post(member.peer, away)
        self._forget(group)
        self._counts["workers_lost"] += group.is_ready
        self._totals.workers_lost += group.is_ready
        self._tell(WorkerLost(group.name, reason) if group.is_ready else WorkerProgress(group.name, reason))

    def _forget(self, group: Group) -> None:
        del self._groups[group.name]
        for member in group.members.values():
            self._peers.pop(member.peer, None)
        group.close()
