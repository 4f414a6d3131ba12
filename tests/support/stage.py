"""A simulated world without dice: a test tells a story, and everything between its sentences runs as it should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from tests.support.chain_engine import Adapter
from tests.support.simulated_clients import BASE, datum
from tests.support.simulated_worker import WORKER, Sent, failed
from tests.support.simulation import INFO, POLICY, World
from tx_async.errors import TxError
from tx_async.scheduler.assets import new_sampler
from tx_async.scheduler.core.facts import LiveRequested, SamplerCreated, SessionCreated, Tick
from tx_async.scheduler.core.instructions import Deliver
from tx_async.scheduler.core.policy import Policy
from tx_async.scheduler.interface import LivePiece
from tx_async.scheduler.submissions import key_of
from tx_async.scheduler.training.lanes import Lane
from tx_async.wire import results
from tx_async.wire.ids import sampler_id
from tx_async.wire.operations import (
    CreateModel,
    ForwardBackward,
    LoadWeights,
    Operation,
    OptimStep,
    Sample,
    SaveWeights,
)
from tx_async.wire.records import Put, RequestRecord, ResultRecord, SessionRecord, decode_record
from tx_async.wire.worker import AdamParams, AdapterConfig, Command, EngineInfo, TrainMicroBatch

POISON_TOKEN = 98
"""A datum that begins with it kills the worker that trains it."""


class Watched:
    """What the client of a live request was told."""

    def __init__(self):
        self.pieces: list[LivePiece] = []
        self.error: TxError | None = None

    def tokens(self, index: int = 0) -> list[int]:
        return [int(t) for p in self.pieces if p.index == index for t in np.frombuffer(p.tokens, "<i4")]

    @property
    def num_ended(self) -> int:
        return sum(piece.stop_reason is not None for piece in self.pieces)


class Stage(World):
    """Requests are named by what `submit` returns. `run` lets everything happen that can; `settle` only what the server
    does with its disk."""

    def __init__(self, info: EngineInfo = INFO, policy: Policy = POLICY, with_worker: bool = True):
        super().__init__(0, num_models=0, info=info, policy=policy, fault_rate=0.0)
        #: what clients of live requests were told, by request
        self.watched: dict[str, Watched] = {}
        #: commands that the worker has executed, in order
        self.executed: list[Command] = []
        if with_worker:
            self.start_worker()

    # ---- what tests say

    def new_session(self, name: str) -> str:
        record = SessionRecord(session_id=name, owner=self.owner, created_at=self.now)
        self._write([Put(record)])
        self.handle(SessionCreated(record))
        return name

    def model(self, session: str = "s", seed: int = 0, rank: int = 4) -> str:
        """A new run; its name."""
        number = len(self.models)
        name = f"{session}:train:{number}"
        self.models.append(name)
        lora = AdapterConfig(rank=rank, seed=seed or number)
        self.submit_now(
            CreateModel(model_id=name, session_id=session, model_seq_id=number, base_model="base", lora=lora)
        )
        return name

    def submit_now(self, operation: Operation) -> str:
        """Submit and make durable; the request's id. Raises what the client would be told."""
        key = key_of(operation)
        self.operations[key] = operation
        self._submit(operation)
        self.settle()
        known = self.catalog.find_request(*key)
        assert known is not None
        return known.request_id

    def forward_backward(
        self, model: str, seq_id: int, sizes: tuple[int, ...] = (3,), token: int = 1, forward_only: bool = False
    ) -> str:
        run = self.models.index(model)
        data = tuple(datum([token, run, *range(size - 2)]) for size in sizes)
        return self.submit_now(
            ForwardBackward(
                model_id=model, seq_id=seq_id, data=data, loss_fn="cross_entropy", forward_only=forward_only
            )
        )

    def optim_step(self, model: str, seq_id: int) -> str:
        return self.submit_now(OptimStep(model_id=model, seq_id=seq_id, adam_params=AdamParams()))

    def save(self, model: str, seq_id: int, name: str, kind: str = "weights", overwrite: bool = False) -> str:
        return self.submit_now(
            SaveWeights(model_id=model, seq_id=seq_id, kind=kind, name=name, overwrite=overwrite)  # type: ignore[arg-type]
        )

    def save_ephemeral(self, model: str, seq_id: int, number: int, inflight: bool = False) -> str:
        return self.submit_now(
            SaveWeights(
                model_id=model,
                seq_id=seq_id,
                kind="sampler_weights",
                name=None,
                sampling_session_seq_id=number,
                inflight=inflight,
            )
        )

    def load(self, model: str, seq_id: int, path: str, optimizer: bool = True) -> str:
        return self.submit_now(LoadWeights(model_id=model, seq_id=seq_id, path=path, optimizer=optimizer))

    def train(self, model: str, steps: int, first_seq_id: int = 1) -> list[str]:
        """Steps of a loop: forward_backward, optim_step."""
        requests = []
        for i in range(steps):
            seq_id = first_seq_id + 2 * i
            requests.append(self.forward_backward(model, seq_id, token=1 + seq_id % 80))
            requests.append(self.optim_step(model, seq_id + 1))
        return requests

    def sampler(self, session: str = "s", path: str | None = None) -> str:
        self.num_names += 1
        name = sampler_id(session, 1000 + self.num_names)
        record = new_sampler(self.catalog, self.catalog.sessions[session], name, BASE.name, path, self.now)
        self.handle(SamplerCreated(record))
        self.settle()
        return name

    def ask(self, sampler: str, num_samples: int = 1, max_tokens: int = 4, token: int = 5) -> str:
        """A sample request."""
        self.num_samples += 1
        return self.submit_now(
            Sample(
                sampling_session_id=sampler,
                seq_id=self.num_samples,
                prompt=np.array([token], np.int32).tobytes(),
                num_samples=num_samples,
                max_tokens=max_tokens,
                use_eos=False,
            )
        )

    def watch(self, name: str = "live-1", **fields: Any) -> Watched:
        """A live request of that name for the base model."""
        prompt = np.array([5], np.int32).tobytes()
        fields = {"max_tokens": 12, "use_eos": False} | fields
        operation = Sample(sampling_session_id="", seq_id=0, prompt=prompt, **fields)
        watched = self.watched[name] = Watched()
        record = RequestRecord(
            request_id=name, owner=self.owner, kind="LiveSample", subject="", seq_id=0, body_digest="", body_bytes=4,
            created_at=self.now,
        )  # fmt: skip
        self.handle(LiveRequested(record, operation, None))
        return watched

    def _deliver_live(self, instruction: Deliver) -> None:
        watched = self.watched[instruction.request_id]
        assert watched.error is None, "told something after its end"
        watched.pieces += instruction.pieces
        watched.error = instruction.error

    # ---- time

    def settle(self) -> None:
        """Everything that waits for the disk becomes durable."""
        while self.commits or self.reads or self.listings:
            if self.commits:
                self.commit_some()
            elif self.listings:
                self.deliver_a_listing()
            else:
                self.read_body()

    def run(self, events_max: int = 20_000) -> None:
        """Until nothing can happen any more without time passing."""
        for _ in range(events_max):
            if not self.step():
                return
        raise AssertionError(f"it goes on for ever: {self.state!r}")

    def step(self) -> bool:
        """One thing happens; False when nothing can."""
        self.settle()
        if self.worker is None:
            return False
        if self.worker.outbox:
            self._deliver()
        elif self.worker.inbox:
            self.execute_next()
        elif self.worker.saving:
            self.finish_a_save()
        else:
            return False
        self.settle()
        return True

    def run_until_next(self, is_it: Callable[[Sent], bool]) -> None:
        """Until a command that the test waits for is the worker's next."""
        while not (self.worker and self.worker.inbox and is_it(self.worker.inbox[0])):
            assert self.step(), "it never comes"

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.handle(Tick())
        self.settle()

    def execute_next(self) -> None:
        """A poisoned datum kills the worker; another one starts."""
        assert self.worker is not None
        sent = self.worker.inbox[0]
        self.executed.append(sent.command)  # type: ignore[arg-type]
        if isinstance(sent.command, TrainMicroBatch) and (sent.tensors[0][:, 0] == POISON_TOKEN).any():
            self.crash_worker()
            self.start_worker()
            return
        super().execute_next()

    def fail_next(self, category: str, message: str) -> Command:
        """The worker fails the command that is next; the command."""
        assert self.worker is not None
        sent = self.worker.inbox.popleft()
        self.handle(failed(sent, category, message))
        return sent.command  # type: ignore[return-value]

    # ---- what tests look at

    def commands_caused_by(self, cause: str) -> list[Command]:
        """Of those that the worker has not executed yet."""
        assert self.worker is not None
        return [sent.command for sent in self.worker.inbox if sent.cause == cause]  # type: ignore[misc]

    def lane(self, model: str) -> Lane:
        return self.state.training.runs.lanes[model]

    def is_resident(self, model: str) -> bool:
        """Whether the device holds the run's state."""
        return any(worker.has_run(model) for worker in self.state.workers.values())

    def result(self, request_id: str) -> ResultRecord | None:
        row = self.disk.tables["result"].get(request_id)
        if row is None:
            return None
        result = decode_record(row)
        assert isinstance(result, ResultRecord)
        return result

    def error(self, request_id: str) -> str:
        """Message of a failed request; "" when it succeeded. It has ended."""
        result = self.result(request_id)
        assert result is not None, f"{request_id} has not ended"
        return msgspec.json.decode(result.payload)["error"] if result.content == "error" else ""

    def weights_shown(self, request_id: str) -> int:
        """What a forward_backward saw of its run's weights."""
        result = self.result(request_id)
        assert result is not None and result.content == "forward_backward", result
        return int(results.decode_forward_backward(result.payload).logprobs[0].numpy().ravel()[0])

    def adapter(self, model: str) -> Adapter:
        """The run's state on the device."""
        assert self.worker is not None
        slot = self.state.workers[WORKER].training_slots.slot_of(model)
        assert slot is not None
        return self.worker.engine.training[slot][1]

    def request(self, request_id: str) -> RequestRecord:
        return self.catalog.requests[request_id]
