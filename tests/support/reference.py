"""What every client of a simulated world must have been told, and what must lie on its disk, computed in plain Python
from the operations alone: each run's operations in `seq_id` order, each once, leaving out those that failed without
effect."""

from __future__ import annotations

import msgspec
import numpy as np

from tests.support.chain_engine import Adapter, reference_rows, reference_sample
from tests.support.simulated_clients import BASE
from tests.support.simulation import World
from tx_async.scheduler.core.state import seed_of
from tx_async.scheduler.training.lanes import REPLAYED_KINDS
from tx_async.wire import results
from tx_async.wire.operations import (
    CreateModel,
    CreateModelFromCheckpoint,
    ForwardBackward,
    LoadWeights,
    Operation,
    OptimStep,
    Rejected,
    Sample,
    SaveWeights,
)
from tx_async.wire.records import RequestRecord, ResultRecord, decode_record

FILE_KINDS = {"weights": "training", "sampler_weights": "sampler"}
HONEST = (
    "it did not work out",
    "was unloaded",
    "is unloaded",
    "came too late",
    "could not be written",
    "could not be read",
    "is empty",
    "exists already",
    "no such checkpoint",
    "There is no checkpoint",
    "cancelled",
    "session of this request",
    "malformed",
    "NaN or infinite",
    "is gone",
)
"""Parts of the messages of failures that the simulation causes; any other failure is a mistake of ours."""


class Reference:
    def __init__(self, world: World):
        self.world = world
        self.info = world.info
        self.operations: dict[tuple[str, int], Operation] = world.operations
        self.requests: dict[str, list[RequestRecord]] = {}
        for row in world.disk.tables["request"].values():
            request = decode_record(row)
            assert isinstance(request, RequestRecord)
            self.requests.setdefault(request.subject, []).append(request)
        #: storage key -> what was saved under it
        self.files: dict[str, Adapter] = {}
        #: model_id -> state after each seq_id
        self.states: dict[str, dict[int, Adapter]] = {}
        self.num_compared = 0

    def check(self) -> None:
        """Raises `AssertionError` naming the first thing that differs."""
        for name in self.world.models:
            self._run_of(name)
        self._check_files()
        self._check_device()
        self._check_no_orphans()
        self._check_samples()
        self._check_journal()
        for request_id in self.world.acknowledged:
            self.world._look(request_id)
            assert request_id in self.world.seen, f"{request_id} never ended"

    # ---- runs

    def _run_of(self, name: str) -> dict[int, Adapter]:
        if name not in self.states:
            self.states[name] = {}
            self._replay(name)
        return self.states[name]

    def _replay(self, name: str) -> None:
        start = self._created(name)
        if start is None:
            return
        states = self.states[name]
        states[0] = state = start
        paths: dict[str, Adapter] = {}
        for request in sorted(self.requests.get(name, []), key=lambda request: request.seq_id):
            if request.seq_id > 0:
                state = self._apply(request, state, paths)
                states[request.seq_id] = state

    def _created(self, name: str) -> Adapter | None:
        operation = self.operations.get((name, 0))
        if isinstance(operation, CreateModel):
            return Adapter.created(operation.lora)
        model = self.world.catalog.models.get(name)
        if model is None or not isinstance(operation, CreateModelFromCheckpoint):
            return None
        assert model.created_from is not None
        return self.file(model.created_from).loaded(operation.optimizer)

    def file(self, key: str) -> Adapter:
        """What the files under a key must hold: `<model_id>/<kind>/<name>~<seq_id>`."""
        self._run_of(key.partition("/")[0])
        return self.files[key]

    def _apply(self, request: RequestRecord, state: Adapter, paths: dict[str, Adapter]) -> Adapter:
        operation = self.operations[request.subject, request.seq_id]
        result = self._result(request)
        failed = result.content == "error"
        self.num_compared += 1
        where = f"{request.subject} seq_id {request.seq_id} ({request.request_id})"
        match operation:
            case ForwardBackward() if not failed:
                self._check_forward(where, result, state)
                if not operation.forward_only:
                    for tokens, has_nan in reference_rows(operation, self.info):
                        state = state.with_row(tokens, has_nan)
            case OptimStep(adam_params=adam) if not failed:
                assert state.gradients != -1, f"{where}: a step with NaN gradients succeeded"
                state = state.stepped(adam.learning_rate)
                shown = msgspec.json.decode(result.payload)["metrics"]["weights"]
                assert shown == state.visible, f"{where}: weights {shown}, not {state.visible}"
            case OptimStep() if b"NaN or infinite" in result.payload:
                assert state.gradients == -1, f"{where}: a step without NaN gradients failed"
                state = state.cleared()
            case SaveWeights() if not failed:
                key = f"{request.subject}/{operation.kind}/{operation.name or 'ephemeral'}~{request.seq_id}"
                self.files[key] = saved = state.saved(FILE_KINDS[operation.kind])
                if operation.kind == "weights":
                    paths[f"tinker://{request.subject}/weights/{operation.name}"] = saved
            case LoadWeights(path=path, optimizer=optimizer) if not failed:
                state = paths[path].loaded(optimizer)
            case Rejected():
                assert failed
        if failed:
            self._check_honest(where, result)
        return state

    def _result(self, request: RequestRecord) -> ResultRecord:
        row = self.world.disk.tables["result"].get(request.request_id)
        assert row is not None, f"{request.subject} seq_id {request.seq_id} ({request.request_id}) never ended"
        result = decode_record(row)
        assert isinstance(result, ResultRecord)
        if not result.payload:
            payload = self.world.disk.bodies[f"result/{request.request_id}"][2]
            result = msgspec.structs.replace(result, payload=payload)
        return result

    def _check_forward(self, where: str, result: ResultRecord, state: Adapter) -> None:
        for tensor in results.decode_forward_backward(result.payload).logprobs:
            shown = set(tensor.numpy().ravel().tolist())
            assert shown == {float(state.visible)}, f"{where}: weights {shown}, not {state.visible}"

    def _check_honest(self, where: str, result: ResultRecord) -> None:
        message = msgspec.json.decode(result.payload)["error"]
        assert any(part in message for part in HONEST), f"{where}: {message}"

    # ---- what lies on disks and devices

    def _check_files(self) -> None:
        world = self.world
        for record in [*world.catalog.checkpoints.values(), *world.catalog.samplers.values()]:
            if record.storage_key is not None:
                assert world.storage.files.get(record.storage_key) == self.file(record.storage_key), record
        for model in world.catalog.models.values():
            assert model.status != "corrupted", model
            for snapshot in model.snapshots if model.status == "live" else ():
                if snapshot.key not in world.storage.damaged:
                    expected = self._state_at(model.model_id, snapshot.seq_id)
                    assert world.storage.files.get(snapshot.key) == expected, f"{snapshot}"

    def _check_no_orphans(self) -> None:
        """Storage has those snapshots that a run knows, and no others; once there was time to look (`World.tidy`)."""
        world = self.world
        if world.state.training.runs.littered or world.listings:
            return
        known = {
            snapshot.key for lane in world.state.training.runs.lanes.values() for snapshot in lane.known_snapshots()
        }
        there = {key for key in world.storage.files if "/snapshots/" in key}
        assert there <= known, f"orphans {there - known}"

    def _state_at(self, name: str, seq_id: int) -> Adapter:
        states = self.states[name]
        return states[max(s for s in states if s <= seq_id)]

    def _check_device(self) -> None:
        world = self.world
        if world.worker is None:
            return
        for name, slot in world.state.workers["w0"].training_slots.slots().items():
            lane = world.state.training.runs.lanes[name]
            _, adapter = world.worker.engine.training[slot]
            assert adapter == self._state_at(name, lane.cursor - 1), f"{name} on the device"

    def _check_journal(self) -> None:
        """Bodies stay as long as a replay may need them, and not longer."""
        catalog = self.world.catalog
        needed = set()
        for request in catalog.requests.values():
            model = catalog.models.get(request.subject)
            is_replayed = request.kind in REPLAYED_KINDS and not request.skipped
            if model and model.status == "live" and is_replayed and request.seq_id > model.dropped_seq_id:
                needed.add(request.request_id)
        kept = {key for key in self.world.disk.bodies if not key.startswith("result/")}
        created = {q.request_id for q in catalog.requests.values() if q.kind == CreateModel.__name__}
        assert kept - created == needed, f"superfluous {kept - created - needed}, missing {needed - kept}"

    # ---- samples

    def _check_samples(self) -> None:
        for sampler_id in self.world.catalog.samplers:
            for request in self.requests.get(sampler_id, []):
                operation = self.operations[request.subject, request.seq_id]
                assert isinstance(operation, Sample)
                result = self._result(request)
                self.num_compared += 1
                if result.content == "error":
                    assert request.request_id in self.world.cancelled or b"could not be read" in result.payload, result
                else:
                    self._check_sample(request, operation, result)

    def _check_sample(self, request: RequestRecord, operation: Sample, result: ResultRecord) -> None:
        room = BASE.max_context_length - len(operation.prompt) // 4
        length = min(operation.max_tokens or room, room)
        sequences = results.decode_sample(result.payload).sequences
        shown = [np.frombuffer(sequence.tokens, np.int32).tolist() for sequence in sequences]
        expected = [
            [
                reference_sample(weights, operation.prompt, seed_of(request), index, length)
                for index in range(operation.num_samples)
            ]
            for weights in self._weights_of(request.subject)
        ]
        assert shown in expected, f"{request}: {shown}"

    def _weights_of(self, sampler_id: str) -> list[int]:
        """An inflight session moves on with its run: any of its versions may have been the newest."""
        sampler = self.world.catalog.samplers[sampler_id]
        if sampler.storage_key is None:
            return [7]
        if sampler.inflight_model_id is None:
            return [self.file(sampler.storage_key).weights]
        prefix = f"{sampler.inflight_model_id}/sampler_weights/ephemeral~"
        return [adapter.weights for key, adapter in self.files.items() if key.startswith(prefix)]
