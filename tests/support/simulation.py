"""A whole server in one thread and one seed: the real `SchedulerState` and the real records over a disk that loses what
was not committed, workers that crash, stall and answer late or twice, clients that retry, reorder and give up.

`World.act` lets one thing happen, chosen by the seed; `World.quiesce` stops all faults and lets everything end;
`World.check` compares what clients were told, and what is on disk, with a reference in plain Python. The invariants
that must hold at every moment are asserted in passing.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from tests.support.chain_engine import Storage
from tests.support.simulated_clients import BASE, OWNER, Clients
from tests.support.simulated_worker import WORKER, Sent, SimulatedWorker, failed, finished
from tx_async.config import ServerConfig
from tx_async.errors import StorageError, TxError
from tx_async.journal.transaction import Transaction
from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.core.facts import (
    BodyLoaded,
    Fact,
    FilesListed,
    ResultDurable,
    Tick,
)
from tx_async.scheduler.core.instructions import (
    Append,
    DeleteFiles,
    Deliver,
    FetchBody,
    Finish,
    Instruction,
    ListFiles,
    Publish,
    Send,
    Widen,
)
from tx_async.scheduler.core.marks import NUM_BYTES, ReplayMarks
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.core.state import SchedulerState
from tx_async.scheduler.outbox import changes_of
from tx_async.scheduler.quota import Quota
from tx_async.scheduler.submissions import Submissions, key_of
from tx_async.scheduler.training.orphans import LOOK_AFTER_S
from tx_async.testing.memory_journal import MemoryDisk
from tx_async.wire import operations
from tx_async.wire.facts import WorkerLost, WorkerReady
from tx_async.wire.records import (
    Change,
    Put,
    ResultRecord,
    SessionRecord,
    decode_record,
)
from tx_async.wire.worker import (
    EngineInfo,
    Result,
    SaveAdapter,
    Saved,
    TrainMicroBatch,
)

INFO = EngineInfo(
    vocab_size=100,
    max_context_length=16,
    row_shapes=((2, 4), (2, 8), (1, 16)),
    row_length_preferred=8,
    target_tokens_k=(1,),
    num_training_slots=2,
    num_sampler_slots=2,
    max_lora_rank=8,
    num_sequences_max=4,
    decode_steps=2,
    prefill_tokens=8,
)
POLICY = Policy(
    snapshot_every_steps=3, snapshot_idle_s=20.0, seq_gap_s=30.0, chunk_gap_s=60.0, patience_turns=6, attempts_max=50
)
CONFIG = ServerConfig(queued_requests_max=5_000)


class World(Clients):
    def __init__(
        self,
        seed: int,
        *,
        num_models: int = 3,
        info: EngineInfo = INFO,
        policy: Policy = POLICY,
        fault_rate: float = 1.0,
    ):
        super().__init__(random.Random(seed))
        self.info = info
        self.policy = policy
        self.fault_rate = fault_rate
        self.now = 1_000.0
        self.disk = MemoryDisk()
        #: outlives the server
        self.marks = bytearray(NUM_BYTES)
        self.storage = Storage()
        self.worker: SimulatedWorker | None = None
        #: commits that are not durable yet, oldest first: changes, and what happens when they are
        self.commits: deque[tuple[tuple[Change, ...], Callable[[], None]]] = deque()
        #: bodies that the server is reading
        self.reads: list[str] = []
        #: folders that the server has asked storage for, with what it found there
        self.listings: list[FilesListed] = []
        self.num_events = 0
        self.num_crashes = 0
        #: the worker was told to start again with wider slots, and how often that was so
        self.is_widening = False
        self.num_widenings = 0
        self.session = SessionRecord(session_id="s", owner=OWNER, created_at=self.now)
        self.disk.write(Transaction([Put(self.session)]))
        self._start_server()
        for _ in range(num_models):
            self.create_model()

    @classmethod
    def varied(cls, seed: int) -> World:
        """A world whose size, shapes and habits depend on the seed, too."""
        choose = random.Random(seed)
        rows = choose.choice([1, 2, 3])
        info = msgspec.structs.replace(
            INFO,
            overlaps=choose.random() < 0.5,
            row_shapes=((rows, 4), (rows, 8), (1, 16)),
            num_training_slots=choose.choice([1, 2, 3]),
            num_sampler_slots=choose.choice([1, 2]),
            num_sequences_max=choose.choice([1, 4, 9]),
            lora_rank_classes=(2, 4, 8),
            lora_rank_limit=8,
            max_lora_rank=2 + 6 * (seed % 2),
        )
        policy = msgspec.structs.replace(
            POLICY,
            quanta_in_flight_max=choose.choice([1, 2, 3]),
            commands_in_flight_max=choose.choice([3, 32]),
            snapshot_every_steps=choose.choice([1, 2, 5, 100]),
            snapshot_every_bytes=choose.choice([500, 2**20]),
        )
        return cls(
            seed, num_models=choose.randint(1, 5), info=info, policy=policy, fault_rate=choose.choice([0.3, 1, 2])
        )

    # ---- the server's life

    def _start_server(self) -> None:
        rows = [decode_record(row) for table in self.disk.tables.values() for row in table.values()]
        self.catalog = Catalog(rows)
        self.state = SchedulerState(self.catalog, BASE, self.policy, self.now, ReplayMarks(self.marks))
        self.quota = Quota(CONFIG)
        self.submissions = Submissions(self.state, self.quota, self._new_id)
        for request in self.catalog.requests.values():
            if request.request_id not in self.catalog.results:
                self.quota.take(request)
        self._perform(self.state.restore())

    def crash_server(self) -> None:
        """Some of what was on its way to the disk may have arrived; nobody hears of it. Its worker ends with it."""
        for _ in range(self.random.randint(0, len(self.commits)) if self.random.random() < 0.5 else 0):
            self._write(self.commits.popleft()[0])
        self.commits.clear()
        self.reads.clear()
        self.listings.clear()
        for accepting in self.accepting.values():
            self.to_send.append(accepting.accepted.operation)
        self.accepting.clear()
        self._end_worker()
        self.now += 0.001  # no two lives begin at the same moment
        self._start_server()

    def _write(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if isinstance(change, Put) and isinstance(change.record, ResultRecord):
                known = change.record.request_id in self.disk.tables["result"]
                assert not known, f"{change.record.request_id} ended twice"
        self.disk.write(Transaction(changes))

    def commit_some(self) -> None:
        """One transaction of the journal: what waits, up to a point."""
        batch = [self.commits.popleft() for _ in range(self.random.randint(1, len(self.commits)))]
        self._write([change for changes, _ in batch for change in changes])
        for _, then in batch:
            then()

    def handle(self, fact: Fact) -> None:
        self._perform(self.state.handle(fact, self.now))
        self._check_always()
        if self.is_widening:
            self.is_widening = False
            self._end_worker()
            self.handle(WorkerLost(WORKER, "it starts again with wider slots"))

    def _perform(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self._send(instruction)
                case Append() | Finish() | DeleteFiles():
                    self.commits.append((changes_of(instruction), lambda item=instruction: self._show(item)))
                case Publish():
                    self.quota.give_back(instruction.result.request_id)
                case Deliver():
                    self._deliver_live(instruction)
                case Widen():
                    assert self.info.max_lora_rank < instruction.lora_rank <= self.info.lora_rank_limit
                    self.info = msgspec.structs.replace(self.info, max_lora_rank=instruction.lora_rank)
                    self.is_widening = True
                    self.num_widenings += 1
                case FetchBody():
                    self.reads.append(instruction.request_id)
                case ListFiles():
                    self.listings.append(self._list(instruction))
                case _:
                    pass  # nobody watches

    def _deliver_live(self, instruction: Deliver) -> None:
        """Nobody reads along, unless a test does."""

    def _list(self, instruction: ListFiles) -> FilesListed:
        """Storage is asked now; the answer arrives later."""
        try:
            return FilesListed(instruction.model_id, tuple(self.storage.list(instruction.prefix)))
        except StorageError:
            return FilesListed(instruction.model_id, None)

    def _show(self, item: Instruction) -> None:
        if isinstance(item, Finish):
            self.handle(ResultDurable(item.result))
        elif isinstance(item, DeleteFiles):
            self._check_not_named(item.storage_key)
            self.storage.delete(item.storage_key)

    def _check_not_named(self, key: str) -> None:
        """No record on disk names files that are deleted."""
        for table in ("checkpoint", "sampler"):
            for row in self.disk.tables[table].values():
                assert decode_record(row).storage_key != key, f"{key} is deleted and still named"  # type: ignore[union-attr]

    def _send(self, instruction: Send) -> None:
        if self.worker is None or instruction.worker_id != WORKER:
            return  # it has just died; the server will hear of it
        assert instruction.number == self.worker.last_number + 1
        self.worker.last_number += 1
        tensors = [np.array(tensor) for tensor in instruction.tensors]
        self.worker.inbox.append(Sent(instruction.number, instruction.command, tensors, instruction.cause))

    # ---- the worker's life

    def start_worker(self) -> None:
        self.worker = SimulatedWorker(self.info, self.storage)
        self.handle(WorkerReady(WORKER, self.info, frozenset({"train", "sample"})))

    def _end_worker(self) -> None:
        """Files that were being written are there or not, never half."""
        if self.worker is not None:
            self.num_crashes += 1
            for sent in self.worker.saving:
                assert isinstance(sent.command, SaveAdapter)
                if self.random.random() < 0.3 and sent.command.key in self.worker.engine.kept:
                    self.storage.write(sent.command.key, self.worker.engine.kept[sent.command.key])
            self.worker = None

    def crash_worker(self) -> None:
        self._end_worker()
        self.handle(WorkerLost(WORKER, "crash"))

    def execute_next(self) -> None:
        assert self.worker is not None
        sent = self.worker.inbox.popleft()
        self._check_slots(sent)
        if isinstance(sent.command, TrainMicroBatch) and self._fault(0.01):
            category = self.random.choice(["server", "unknown", "user"])
            self.worker.outbox.append(failed(sent, category, "it did not work out"))
            return
        try:
            result, tensors = self.worker.engine.execute(sent.command, sent.tensors)  # type: ignore[arg-type]
        except TxError as error:
            self.worker.outbox.append(failed(sent, error.category, error.message, type(error).__name__))
            return
        if isinstance(sent.command, SaveAdapter):
            self.worker.saving.append(sent)
        else:
            self._answer(sent, result, tensors)

    def _answer(self, sent: Sent, result: Result, tensors: list[np.ndarray]) -> None:
        assert self.worker is not None
        fact = finished(sent, result, tensors, self.random.random() * 20)
        self.worker.outbox.append(fact)
        if self._fault(0.02):
            self.worker.outbox.append(fact)  # it answers twice

    def finish_a_save(self) -> None:
        assert self.worker is not None
        sent = self.worker.saving.pop(self.random.randrange(len(self.worker.saving)))
        assert isinstance(sent.command, SaveAdapter)
        try:
            self.worker.engine.finish_save(sent.command.key)
            self.handle(finished(sent, Saved(size_bytes=1)))
        except StorageError as error:
            self.handle(failed(sent, error.category, error.message, type(error).__name__))

    def _check_slots(self, sent: Sent) -> None:
        """Rows are trained in the slot of their own run: its number is the second token of every datum."""
        if not isinstance(sent.command, TrainMicroBatch):
            return
        assert self.worker is not None
        for r, slot in enumerate(sent.command.slots):
            if slot in self.worker.engine.training:
                name, _ = self.worker.engine.training[slot]
                run = int(sent.tensors[0][r][1])
                lane = self.state.training.runs.lanes.get(self.models[run]) if run < len(self.models) else None
                created_here = lane is not None and name in (f"created {lane.model.lora.seed}", lane.model.created_from)
                loaded = name.startswith(self.models[run] + "/") or any(
                    name == request.storage_key for request in self.catalog.requests.values()
                )
                assert lane is None or created_here or loaded, f"run {run} was trained in the slot of {name}"

    # ---- disks and time

    def read_body(self) -> None:
        name = self.reads.pop(self.random.randrange(len(self.reads)))
        body = self.disk.bodies.get(name)
        self.handle(BodyLoaded(name, operations.decode(body[2]) if body else None, "gone"))

    def deliver_a_listing(self) -> None:
        self.handle(self.listings.pop(0))

    def pass_time(self) -> None:
        self.now += self.random.choice([0.1, 1.0, 5.0, 30.0])
        self.handle(Tick())

    def damage_a_snapshot(self) -> None:
        """The newest of two: the older one and a longer replay must do."""
        runs = self.state.training.runs
        lanes = [lane for lane in runs.lanes.values() if len(lane.model.snapshots) == 2]
        if lanes:
            lane = self.random.choice(lanes)
            newest, older = lane.model.snapshots
            if older.key in self.storage.files and older.key not in self.storage.damaged:
                self.storage.damaged.add(newest.key)

    # ---- what happens next

    def act(self) -> None:
        """One event."""
        self.num_events += 1
        choices: list[tuple[float, Callable[[], None]]] = [
            (1.0 if len(self.to_send) < 30 else 0.0, self.train),
            (0.4, self.sample),
            (3.0 if self.to_send or self.sent else 0.0, self.send_next),
            (0.5, self.poll),
            (0.3, self.pass_time),
            (0.05, self.cancel),
            (0.01, self.unload),
            (0.1 if self.stragglers else 0.0, self.send_straggler),
            (0.05, self.create_from_checkpoint),
            (0.05, self.delete_checkpoint),
            (0.08 * self.fault_rate, self.crash_server),
            (0.03 * self.fault_rate, self.damage_a_snapshot),
            (0.03 * self.fault_rate, self._toggle_storage),
        ]
        self._choose(choices + self._progress())

    def _progress(self) -> list[tuple[float, Callable[[], None]]]:
        """What brings accepted work further."""
        choices: list[tuple[float, Callable[[], None]]] = []
        if self.commits:
            choices.append((3.0, self.commit_some))
        if self.reads:
            choices.append((3.0, self.read_body))
        if self.listings:
            choices.append((1.0, self.deliver_a_listing))
        if self.worker is None:
            choices.append((1.0, self.start_worker))
            return choices
        if self.worker.inbox:
            choices.append((3.0, self.execute_next))
        if self.worker.outbox:
            choices.append((3.0, self._deliver))
        if self.worker.saving:
            choices.append((1.0, self.finish_a_save))
        choices.append((0.12 * self.fault_rate, self.crash_worker))
        return choices

    def _choose(self, choices: list[tuple[float, Callable[[], None]]]) -> None:
        weights = [weight for weight, _ in choices]
        self.random.choices([action for _, action in choices], weights)[0]()

    def _deliver(self) -> None:
        assert self.worker is not None
        self.handle(self.worker.outbox.popleft())

    def _toggle_storage(self) -> None:
        self.storage.is_down = not self.storage.is_down

    def quiesce(self, events_max: int = 50_000) -> None:
        """No more faults and no new work: everything that was accepted ends."""
        self.fault_rate = 0.0
        self.storage.is_down = False
        for operation in self.to_send:
            self.operations[key_of(operation)] = operation
            self.submit(operation)
        self.to_send.clear()
        for _ in range(events_max):
            choices = self._progress()
            if any(weight for weight, _ in choices):
                self._choose(choices)
            elif len(self.quota):
                self.pass_time()
            else:
                return
        raise AssertionError(f"{len(self.quota)} requests never ended: {self.state!r}")

    def tidy(self) -> None:
        """Time passes until what was left behind by deaths has been looked for."""
        while self.state.training.runs.littered:
            self.now += LOOK_AFTER_S
            self.handle(Tick())
            self.quiesce()

    # ---- invariants of every moment

    def _check_always(self) -> None:
        for worker in self.state.workers.values():
            counts = worker.quanta.values() if self.info.overlaps else [worker.num_quanta]
            assert max(counts) <= self.policy.quanta_in_flight_max
            assert len(worker.sequences) <= self.info.num_sequences_max
            slots = worker.training_slots.slots()
            assert len(set(slots.values())) == len(slots) <= self.info.num_training_slots
            assert set(slots) <= set(self.state.training.runs.lanes), f"{slots}: a run that has ended keeps a slot"
            running = [sample.job.request.request_id for sample in worker.sequences.values()]
            assert set(running) <= set(self.state.sampling.jobs), f"{running}: a request that has ended still runs"
