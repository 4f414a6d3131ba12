"""The clients of a simulated world: they train, save, load and sample, and they retry, reorder and give up.

What they know survives every crash of the server.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np
from msgspec import Struct

from tests.support.chain_engine import NAN_LOSS_TOKEN, NAN_TOKEN
from tx_async.errors import Overloaded, TxError
from tx_async.scheduler.assets import new_sampler
from tx_async.scheduler.core.catalog import Catalog
from tx_async.scheduler.core.facts import (
    CheckpointDeleted,
    Fact,
    RequestCancelled,
    SamplerCreated,
    SubmissionRefused,
)
from tx_async.scheduler.interface import BaseModelInfo
from tx_async.scheduler.submissions import Submission, Submissions, key_of, session_of
from tx_async.testing.memory_journal import MemoryDisk
from tx_async.wire.ids import model_id, sampler_id
from tx_async.wire.operations import (
    CreateModel,
    CreateModelFromCheckpoint,
    Datum,
    ForwardBackward,
    LoadWeights,
    Operation,
    OptimStep,
    Rejected,
    Sample,
    SaveWeights,
    UnloadModel,
)
from tx_async.wire.records import Change, RequestRecord, ResultRecord, decode_record
from tx_async.wire.tensors import Tensor
from tx_async.wire.worker import AdamParams, AdapterConfig

OWNER = "alice"
BASE = BaseModelInfo(name="base", path="", architecture="Chain", vocab_size=100, max_context_length=16)


class Accepted(Struct, frozen=True):
    request: RequestRecord
    operation: Operation


class Clients:
    """A `World` is these clients and the server that they talk to."""

    catalog: Catalog
    submissions: Submissions
    disk: MemoryDisk
    commits: deque[tuple[tuple[Change, ...], Callable[[], None]]]
    now: float
    fault_rate: float

    def __init__(self, random: random.Random):
        self.random = random
        #: request_id -> submission whose commit is on its way
        self.accepting: dict[str, Submission] = {}
        self.num_requests = 0
        #: request_id -> what was acknowledged
        self.acknowledged: dict[str, Accepted] = {}
        #: request_id -> result that was seen
        self.seen: dict[str, ResultRecord] = {}
        #: request_ids that were cancelled by their client
        self.cancelled: set[str] = set()
        #: submissions that may be (re)sent: what a client believes to be unacknowledged or lost
        self.to_send: list[Operation] = []
        self.sent: list[Operation] = []
        #: submissions that were lost on the way, and may arrive at any later time
        self.stragglers: list[Operation] = []
        self.models: list[str] = []
        self.samplers: list[str] = []
        self.unloaded: set[str] = set()
        self.next_seq_id: dict[str, int] = {}
        self.num_names = 0
        self.num_samples = 0
        #: every operation that was ever sent, by its key
        self.operations: dict[tuple[str, int], Operation] = {}
        #: whose key the next submissions carry
        self.owner = OWNER

    def handle(self, fact: Fact) -> None:
        """The server's."""
        raise NotImplementedError

    def commit_some(self) -> None:
        """The server's."""
        raise NotImplementedError

    def _fault(self, probability: float) -> bool:
        return self.random.random() < probability * self.fault_rate

    # ---- what they send

    def create_model(self) -> None:
        number = len(self.models)
        name = model_id("s", number)
        self.models.append(name)
        self.next_seq_id[name] = 1
        lora = AdapterConfig(rank=2 + 2 * (number % 2), seed=number)
        operation = CreateModel(model_id=name, session_id="s", model_seq_id=number, base_model="base", lora=lora)
        self.to_send.append(operation)

    def create_from_checkpoint(self) -> None:
        paths = [path for path, c in self.catalog.checkpoints.items() if c.kind == "weights"]
        if not paths:
            return
        number = len(self.models)
        name = model_id("s", number)
        self.models.append(name)
        self.next_seq_id[name] = 1
        self.to_send.append(
            CreateModelFromCheckpoint(
                model_id=name,
                session_id="s",
                model_seq_id=number,
                path=self.random.choice(sorted(paths)),
                optimizer=self.random.random() < 0.5,
            )
        )

    def train(self) -> None:
        """Operations of one run, sent as the SDK sends a batch that it has cut in pieces: 2..N, then 1."""
        live = [name for name in self.models if name not in self.unloaded]
        if not live:
            return
        name = self.random.choice(live)
        burst = [self._new_operation(name) for _ in range(self.random.randint(1, 4))]
        if self._fault(0.03):
            self.stragglers.append(burst.pop(0))  # its seq_id is burned, unless it comes in time after all
        if self.random.random() < 0.5:
            burst = burst[1:] + burst[:1]
        self.to_send.extend(burst)

    def _take_seq_id(self, name: str) -> int:
        self.next_seq_id[name] += 1
        return self.next_seq_id[name] - 1

    def _new_operation(self, name: str) -> Operation:
        seq_id = self._take_seq_id(name)
        kind = self.random.random()
        if kind < 0.5:
            return self._forward_backward(name, seq_id)
        if kind < 0.75:
            rate = self.random.choice([1e-3, 1e-4])
            return OptimStep(model_id=name, seq_id=seq_id, adam_params=AdamParams(learning_rate=rate))
        if kind < 0.90:
            return self._save(name, seq_id)
        if kind < 0.95:
            return Rejected(model_id=name, seq_id=seq_id, kind="ForwardBackward", message="malformed")
        path = f"tinker://{name}/weights/{self.random.choice('abc')}"
        return LoadWeights(model_id=name, seq_id=seq_id, path=path, optimizer=self.random.random() < 0.5)

    def _forward_backward(self, name: str, seq_id: int) -> ForwardBackward:
        run = self.models.index(name)
        sizes = [self.random.randint(2, 9) for _ in range(self.random.randint(1, 3))]
        first = self.random.choice((NAN_TOKEN, NAN_LOSS_TOKEN)) if self.random.random() < 0.03 else seq_id % 90
        data = tuple(datum([first, run, *range(size - 2)]) for size in sizes)
        forward_only = self.random.random() < 0.2
        return ForwardBackward(
            model_id=name, seq_id=seq_id, data=data, loss_fn="cross_entropy", forward_only=forward_only
        )

    def _save(self, name: str, seq_id: int) -> SaveWeights:
        if self.random.random() < 0.3:
            self.num_names += 1
            return SaveWeights(
                model_id=name,
                seq_id=seq_id,
                kind="sampler_weights",
                name=None,
                sampling_session_seq_id=self.num_names,
                inflight=self.random.random() < 0.5,
            )
        return SaveWeights(
            model_id=name,
            seq_id=seq_id,
            kind=self.random.choice(["weights", "weights", "sampler_weights"]),
            name=self.random.choice("abc"),
            overwrite=self.random.random() < 0.5,
        )

    def sample(self) -> None:
        if not self.samplers or self.random.random() < 0.3:
            self._create_sampler()
        sampler = self.random.choice(self.samplers)
        self.num_samples += 1
        prompt = np.array([self.random.randint(0, 50) for _ in range(self.random.randint(1, 5))], np.int32)
        self.to_send.append(
            Sample(
                sampling_session_id=sampler,
                seq_id=self.num_samples,
                prompt=prompt.tobytes(),
                num_samples=self.random.randint(1, 5),
                max_tokens=self.random.randint(1, 6),
                use_eos=False,
            )
        )

    def _create_sampler(self) -> None:
        """Of a checkpoint, a saved sampler, or the base model; or one that an ephemeral save has made."""
        made = [s for s in self.catalog.samplers if s not in self.samplers]
        if made and self.random.random() < 0.5:
            self.samplers.append(made[0])
            return
        self.num_names += 1
        checkpoints = [None, *sorted(self.catalog.checkpoints)]
        path = self.random.choice(checkpoints)
        session = self.catalog.sessions["s"]
        record = new_sampler(self.catalog, session, sampler_id("s", self.num_names), BASE.name, path, self.now)
        self.handle(SamplerCreated(record))
        while self.commits:  # clients wait until it is durable
            self.commit_some()
        self.samplers.append(record.sampler_id)

    def send_next(self) -> None:
        """A client's submission arrives: its first, or again."""
        if self.to_send and (not self.sent or self.random.random() < 0.8):
            operation = self.to_send.pop(0)
            self.operations[key_of(operation)] = operation
            self.sent.append(operation)
        else:
            operation = self.random.choice(self.sent)
        if self._fault(0.05):
            self.to_send.append(operation)  # no answer in time: it will come again
        self.submit(operation)

    def send_straggler(self) -> None:
        self.to_send.append(self.stragglers.pop(self.random.randrange(len(self.stragglers))))

    def submit(self, operation: Operation) -> None:
        """A client is told why not, and may try again."""
        try:
            self._submit(operation)
        except Overloaded:
            self.handle(SubmissionRefused(key_of(operation)[0]))
        except TxError:
            return

    def _submit(self, operation: Operation) -> None:
        session_of(self.catalog, self.owner, operation)
        submission = self.submissions.submit(self.owner, operation, self.now)
        if isinstance(submission, RequestRecord):
            self._acknowledge(submission, operation)
        elif submission.request.request_id not in self.accepting:
            self.accepting[submission.request.request_id] = submission
            self.commits.append((submission.changes, lambda: self._durable(submission)))

    def _durable(self, submission: Submission) -> None:
        del self.accepting[submission.request.request_id]
        self._acknowledge(submission.request, submission.accepted.operation)
        self.handle(self.submissions.durable(submission))

    def _new_id(self, prefix: str) -> str:
        self.num_requests += 1
        return f"{prefix}-{self.num_requests}"

    def _acknowledge(self, request: RequestRecord, operation: Operation) -> None:
        if not self._fault(0.1):
            self.acknowledged[request.request_id] = Accepted(request, operation)

    def poll(self) -> None:
        """Whatever a client sees once, it sees every time."""
        if self.acknowledged:
            self._look(self.random.choice(list(self.acknowledged)))

    def _look(self, request_id: str) -> None:
        assert request_id in self.catalog.requests, f"{request_id} was acknowledged and is gone"
        if request_id in self.catalog.results:
            row = self.disk.tables["result"].get(request_id)
            assert row is not None, f"the result of {request_id} was shown before it was durable"
            result = decode_record(row)
            assert isinstance(result, ResultRecord)
            if not result.payload:
                result = msgspec.structs.replace(result, payload=self.disk.bodies[f"result/{request_id}"][2])
            assert self.seen.setdefault(request_id, result) == result, f"{request_id} has two results"

    def cancel(self) -> None:
        open_samples = [name for name, a in self.acknowledged.items() if isinstance(a.operation, Sample)]
        if open_samples:
            name = self.random.choice(open_samples)
            self.cancelled.add(name)
            self.handle(RequestCancelled(name))

    def unload(self) -> None:
        live = [name for name in self.models if name not in self.unloaded]
        if len(live) > 2:
            name = self.random.choice(live)
            self.unloaded.add(name)
            self.to_send.append(UnloadModel(model_id=name))

    def delete_checkpoint(self) -> None:
        paths = sorted(self.catalog.checkpoints)
        if paths:
            self.handle(CheckpointDeleted(self.random.choice(paths)))


def datum(tokens: list[int]) -> Datum:
    array = np.array(tokens, np.int32)
    targets = Tensor.of(np.arange(len(tokens), dtype=np.int64))
    return Datum(array.tobytes(), {"target_tokens": targets})
