"""Every integer that a client can send, at the edges: through the API into the real scheduler and its journal, up to
the commands that a worker gets. The answer is a 4xx, a result, or a failure of the user's; the memory, the
worker and everybody else's requests are as before."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import numpy as np
import psutil
import pytest

from tests.support.actor import InProcessServer, running
from tx_async.api.routes import ROUTES, create_api
from tx_async.config import ServerConfig
from tx_async.dashboard.viewer import TOKEN_HEADER
from tx_async.testing.memory_files import MemoryFiles
from tx_async.testing.memory_journal import MemoryDisk
from tx_async.wire import protobuf, tinker
from tx_async.wire.worker import AdmitSequences

INT32 = (-(2**31) - 1, -(2**31), 2**31 - 1, 2**31, 2**32)
INT64 = (-(2**63) - 1, -(2**63), 2**63 - 1, 2**63)
EDGES = (0, -1, *INT32, 2**53, *INT64, 2**64, 10**30)
MEMORY_BYTES_MAX = 64 * 2**20
"""What thousands of requests may leave behind; one container of a client's size would be gigabytes."""
SETTINGS: dict[str, Any] = {"long_poll_ms": 5_000, "seq_gap_ms": 0, "chunk_gap_ms": 0}

Path = tuple[str | int, ...]


class Client:
    """A tenant with a session, a model and a sampler, and the next free number of everything."""

    def __init__(self, server: InProcessServer, key: str):
        app = create_api(server.scheduler, ServerConfig(**SETTINGS), MemoryFiles())
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test", headers={"x-api-key": key})
        self.names: dict[str, Any] = {}
        self.numbers = 0

    async def begin(self) -> None:
        # The page's own routes want its token before they look at a body.
        self.http.headers[TOKEN_HEADER] = (await self.http.get("/dashboard/viewer")).json()["token"]
        session = await self.post("/api/v1/create_session", {})
        self.names["session_id"] = session.json()["session_id"]
        sampler = self.fill(BODIES["/api/v1/create_sampling_session"])
        answer = await self.post("/api/v1/create_sampling_session", sampler)
        self.names["sampling_session_id"] = answer.json()["sampling_session_id"]
        await self.begin_model()

    async def begin_model(self) -> None:
        """Its own for each case: a number that was taken may hold up what comes after it in the same run."""
        answer = await self.post("/api/v1/create_model", self.fill(BODIES["/api/v1/create_model"]))
        self.names["model_id"] = answer.json()["model_id"]
        save = {"model_id": self.names["model_id"], "seq_id": 1, "path": "start"}
        saved = await self.outcome(await self.post("/api/v1/save_weights", save))
        self.names["tinker_path"] = saved["path"]

    def fill(self, body: Any) -> Any:
        """The body with this tenant's names, and fresh numbers where it says so."""
        if isinstance(body, dict):
            return {name: self.fill(value) for name, value in body.items()}
        if isinstance(body, list):
            return [self.fill(value) for value in body]
        if body == "fresh":
            self.numbers += 1
            return self.numbers
        return self.names.get(body.removeprefix("$"), body) if isinstance(body, str) else body

    async def post(self, path: str, body: Any) -> httpx.Response:
        return await self.http.post(self.path(path), content=json.dumps(body))

    def path(self, path: str) -> str:
        run, kind, name = (self.names.get("tinker_path", "tinker://a/b/c").removeprefix("tinker://")).split("/")
        return path.format(session_id=self.names.get("session_id"), run=run, kind=kind, name=name)

    async def outcome(self, promise: httpx.Response) -> dict[str, Any]:
        """How the future ended; what was refused at once, and what is no future, ends as it is."""
        answer = promise.json() if promise.content else {}
        if promise.status_code >= 400 or "request_id" not in answer or "queue_state" in answer:
            return answer
        result = await self.post("/api/v1/retrieve_future", {"request_id": answer["request_id"]})
        assert result.status_code == 200, f"it never ends: {result.text}"
        return result.json()


@asynccontextmanager
async def two_tenants() -> AsyncIterator[tuple[InProcessServer, Client, Client]]:
    async with running(MemoryDisk(), **SETTINGS) as server:
        poisoner, other = Client(server, "tml-poisoner"), Client(server, "tml-other")
        for client in (poisoner, other):
            await client.begin()
        yield server, poisoner, other


DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
    "loss_fn_inputs": {
        "target_tokens": {
            "data": [2, 3],
            "dtype": "int64",
            "shape": [2, 1],
            "sparse_crow_indices": [0, 1, 2],
            "sparse_col_indices": [0, 0],
        },
        "weights": {"data": [1, 1], "dtype": "float32", "shape": [2, 1]},
    },
}
TRAINING = {"model_id": "$model_id", "seq_id": 2}
LOSS = {"data": [DATUM], "loss_fn": "cross_entropy", "loss_fn_config": None}
ADAM = {"learning_rate": 1, "beta1": 0, "beta2": 0, "eps": 1, "weight_decay": 1, "grad_clip_norm": 1}
BODIES: dict[str, Any] = {
    "/api/v1/forward_backward": TRAINING | {"forward_backward_input": LOSS},
    "/api/v1/forward": TRAINING | {"forward_input": LOSS},
    "/api/v1/optim_step": TRAINING | {"adam_params": ADAM},
    "/api/v1/asample": {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 2, "seed": 1, "stop": [5], "temperature": 1, "top_k": 3, "top_p": 1},
        "num_samples": 1,
        "sampling_session_id": "$sampling_session_id",
        "seq_id": "fresh",
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 1,
        "topk_sample_logprobs": 1,
        "target_prompt_logprobs": {
            "data": [2, 3],
            "dtype": "int64",
            "shape": [2, 1],
            "sparse_crow_indices": [0, 1, 2],
            "sparse_col_indices": [0, 0],
        },
        "prompt_alt_tokens_k": 1,
        "prompt_logprobs_last_n": 1,
    },
    "/api/v1/create_session": {"user_metadata": {"number": 1}},
    "/api/v1/create_model": {
        "session_id": "$session_id",
        "model_seq_id": "fresh",
        "base_model": "base",
        "user_metadata": {"number": 1},
        "lora_config": {"rank": 4, "seed": 1},
    },
    "/api/v1/save_weights": TRAINING | {"path": "a", "ttl_seconds": 7200, "user_metadata": {"number": 1}},
    "/api/v1/save_weights_for_sampler": TRAINING
    | {"sampling_session_seq_id": "fresh", "ttl_seconds": 7200, "user_metadata": {"number": 1}},
    "/api/v1/save_weights_external": TRAINING | {"path": "a", "ttl_seconds": 7200},
    "/api/v1/load_weights": {
        "session_id": "$session_id",
        "model_seq_id": "fresh",
        "path": "$tinker_path",
        "optimizer": True,
        "user_metadata": {"number": 1},
    },
    "/api/v1/copy_weights": {
        "source_path": "$tinker_path",
        "session_id": "$session_id",
        "model_seq_id": "fresh",
        "ttl_seconds": 7200,
    },
    "/api/v1/create_sampling_session": {
        "session_id": "$session_id",
        "sampling_session_seq_id": "fresh",
        "base_model": "base",
    },
    "/api/v1/sessions/search": {"limit": 1},
    "/api/v1/training_runs/{run}/checkpoints/{kind}/{name}/ttl": {"ttl_seconds": 7200},
    "/dashboard/checkpoints": {"path": "$tinker_path", "action": "ttl", "ttl_seconds": 7200},
    "/dashboard/downloads": {"path": "$tinker_path", "ttl_seconds": 7200},
}
LOADS_INTO_A_LIVE_RUN = TRAINING | {"path": "$tinker_path", "optimizer": True}
METHODS = {row.path: row.method for row in ROUTES}


def numbers_in(value: Any, path: Path = ()) -> Iterator[Path]:
    """Where in a body a number stands."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers_in(inner, (*path, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers_in(inner, (*path, i))
    elif value == "fresh" or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield path


def with_number(body: Any, path: Path, number: int) -> Any:
    body = copy.deepcopy(body)
    inner = body
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = number
    return body


def integer_fields(kind: Any, seen: frozenset[type] = frozenset()) -> Iterator[str]:
    """Names of the fields of a request struct, and of what it holds, that a client fills with whole numbers."""
    for type_ in _parts(msgspec.inspect.type_info(kind)):
        if isinstance(type_, msgspec.inspect.StructType) and type_.cls not in seen:
            for field in type_.fields:
                parts = list(_parts(field.type))
                if any(isinstance(part, msgspec.inspect.IntType) for part in parts):
                    yield field.encode_name
                for part in parts:
                    if isinstance(part, msgspec.inspect.StructType):
                        yield from integer_fields(part.cls, seen | {type_.cls})


def _parts(type_: Any) -> Iterator[Any]:
    yield type_
    for inner in (*getattr(type_, "types", ()), getattr(type_, "item_type", None), getattr(type_, "value_type", None)):
        if inner is not None:
            yield from _parts(inner)


def assert_honest(status: int, answer: dict[str, Any], what: str) -> None:
    assert status == 200 or 400 <= status < 500, f"{what}: {status} {answer}"
    if status == 200 and "error" in answer:
        assert answer["category"] == "user", f"{what}: {answer}"


async def assert_others_are_served(client: Client, expected: list[int]) -> None:
    body = client.fill(BODIES["/api/v1/asample"])
    outcome = await client.outcome(await client.post("/api/v1/asample", body))
    assert outcome["sequences"][0]["tokens"] == expected


def assert_fits_an_engine(server: InProcessServer) -> None:
    """What engines put into int32 arrays fits them; a seed has 64 bits."""
    for command in server.commands:
        for spec in command.sequences if isinstance(command, AdmitSequences) else ():
            numbers = [value for name, value in msgspec.structs.asdict(spec).items() if type(value) is int]
            numbers.remove(spec.seed)
            assert all(-(2**31) <= number < 2**31 for number in numbers), spec
            assert 0 <= spec.seed < 2**63
    server.commands.clear()


@pytest.mark.parametrize("route", [*BODIES, "/api/v1/load_weights live"])
async def test_no_number_of_a_json_body_harms_anybody(route: str):
    path = route.removesuffix(" live")
    body = LOADS_INTO_A_LIVE_RUN if route.endswith("live") else BODIES[path]
    async with two_tenants() as (server, client, other):
        first = await other.outcome(await other.post("/api/v1/asample", other.fill(BODIES["/api/v1/asample"])))
        expected = first["sequences"][0]["tokens"]
        gc.collect()
        before = psutil.Process().memory_info().rss
        for where in numbers_in(body):
            for number in EDGES:
                await client.begin_model()
                content = client.fill(with_number(body, where, number))
                response = await client.http.request(METHODS[path], client.path(path), content=json.dumps(content))
                assert_honest(response.status_code, await client.outcome(response), f"{where} {number}")
            await assert_others_are_served(other, expected)
            assert_fits_an_engine(server)
        assert psutil.Process().memory_info().rss - before < MEMORY_BYTES_MAX


@pytest.mark.parametrize("sparse", [{}, {"sparse_crow_indices": [0], "sparse_col_indices": []}])
async def test_an_empty_tensor_may_not_have_an_axis_that_nothing_can_address(sparse: dict[str, Any]):
    async with two_tenants() as (_, client, _other):
        for number in (n for n in EDGES if n < 2**63):
            empty = {"data": [], "dtype": "int64", "shape": [0, number], **sparse}
            datum = DATUM | {"loss_fn_inputs": {"target_tokens": empty}}
            body = TRAINING | {"forward_backward_input": LOSS | {"data": [datum]}}
            answer = await client.post("/api/v1/forward_backward", client.fill(body))
            assert_honest(answer.status_code, await client.outcome(answer), str(number))
            await client.begin_model()


def test_every_integer_of_every_request_is_tried():
    for row in ROUTES:
        if row.error is not tinker.ErrorBody or row.path.startswith("/dashboard/playground/"):
            continue  # compatible/test_refusals.py has these bodies
        kinds = [kind for kind in (row.decodes, row.request) if isinstance(kind, type)]
        wanted = {name for kind in kinds for name in integer_fields(kind)}
        tried = {part for where in numbers_in(BODIES.get(row.path, {})) for part in where}
        assert wanted <= tried, f"{row.path}: {wanted - tried}"


def message(model_id: str) -> Any:
    made = protobuf.ForwardBackwardRequest(model_id=model_id, seq_id=2, loss_fn="cross_entropy")
    datum = made.data.add()
    datum.model_input.add().encoded_text.tokens = np.array([1, 2], "<i4").tobytes()
    targets = datum.loss_fn_inputs["target_tokens"]
    targets.dtype = 2
    targets.shape.extend([2, 1])
    targets.sparse_csr.values = np.array([2, 3], "<i8").tobytes()
    targets.sparse_csr.crow_indices = np.array([0, 1, 2], "<i8").tobytes()
    targets.sparse_csr.col_indices = np.array([0, 0], "<i8").tobytes()
    span = datum.model_input_spans.add().prompt_tokens
    span.offset, span.length = 1, 1
    return made


def varint(number: int) -> bytes:
    number %= 2**64
    out = b""
    while number >= 0x80:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def protobuf_bodies(model_id: str, number: int) -> Iterator[bytes]:
    """One for each integer of the message; where protobuf cannot express the number it is sent all the same."""
    yield message(model_id).SerializeToString() + varint(2 << 3) + varint(number)  # seq_id: the last one counts
    yield message(model_id).SerializeToString() + varint(6 << 3) + varint(number)  # forward_only
    packed = np.array([number % 2**64], np.uint64).tobytes()
    for field in ("crow_indices", "col_indices", "values"):
        made = message(model_id)
        csr = made.data[0].loss_fn_inputs["target_tokens"].sparse_csr
        setattr(csr, field, packed + getattr(csr, field)[8:])
        yield made.SerializeToString()
    made = message(model_id)
    made.data[0].model_input[0].encoded_text.tokens = packed
    yield made.SerializeToString()
    for shape in ([number % 2**63, 1], [2, number % 2**63], [number % 2**63 - 2**63, 1], [0, number % 2**63]):
        for is_dense in (False, True):
            made = message(model_id)
            tensor = made.data[0].loss_fn_inputs["target_tokens"]
            tensor.shape[:] = shape
            if is_dense:
                tensor.dense = b"" if 0 in shape else np.array([2, 3], "<i8").tobytes()
            yield made.SerializeToString()
    made = message(model_id)
    made.data[0].model_input_spans[0].prompt_tokens.offset = number % 2**63
    yield made.SerializeToString()


async def test_no_number_of_a_protobuf_body_harms_anybody():
    async with two_tenants() as (server, client, other):
        first = await other.outcome(await other.post("/api/v1/asample", other.fill(BODIES["/api/v1/asample"])))
        gc.collect()
        before = psutil.Process().memory_info().rss
        for number in EDGES:
            for i in range(len(list(protobuf_bodies("", 0)))):
                await client.begin_model()
                content = list(protobuf_bodies(client.names["model_id"], number))[i]
                headers = {"content-type": protobuf.CONTENT_TYPE}
                response = await client.http.post("/api/v1/forward_backward", content=content, headers=headers)
                assert_honest(response.status_code, await client.outcome(response), f"body {i}: {number}")
            await assert_others_are_served(other, first["sequences"][0]["tokens"])
        assert_fits_an_engine(server)
        assert psutil.Process().memory_info().rss - before < MEMORY_BYTES_MAX
