"""The API in front of a fake scheduler, called in this process."""

import httpx
import pytest

from tx_async.api.routes import create_api
from tx_async.config import ServerConfig
from tx_async.testing.fake_scheduler import FakeScheduler

BODY_BYTES_MAX = 200_000


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(long_poll_ms=50, request_body_bytes_max=BODY_BYTES_MAX, sample_num_samples_max=64)


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture
def header_of():
    """The header that carries a key."""
    return lambda key: {"x-api-key": key}


@pytest.fixture
def connect(scheduler, config, header_of):
    """Make a client that sends a key (None sends none)."""
    app = create_api(scheduler, config, scheduler.files)

    def make(key: str | None = "tml-alice") -> httpx.AsyncClient:
        headers = header_of(key) if key is not None else {}
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    return make


@pytest.fixture
async def client(connect):
    async with connect() as client:
        yield client


@pytest.fixture
async def other(connect):
    """The same server with another tenant's key."""
    async with connect("tml-mallory") as client:
        yield client


@pytest.fixture
async def session_id(client) -> str:
    response = await client.post("/api/v1/create_session", json={"tags": ["a"], "user_metadata": {"team": "red"}})
    return response.json()["session_id"]


@pytest.fixture
async def model_id(client, session_id) -> str:
    body = {"session_id": session_id, "model_seq_id": 0, "base_model": "fake/model", "lora_config": {"rank": 8}}
    response = await client.post("/api/v1/create_model", json=body)
    return response.json()["model_id"]


@pytest.fixture
async def sampler_id(client, session_id) -> str:
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "fake/model"}
    response = await client.post("/api/v1/create_sampling_session", json=body)
    return response.json()["sampling_session_id"]


@pytest.fixture
def result(client):
    """Fetch a future's result as the response."""

    async def fetch(promise: httpx.Response, accept: str = "application/json") -> httpx.Response:
        assert promise.status_code == 200, promise.text
        body = {"request_id": promise.json()["request_id"]}
        return await client.post("/api/v1/retrieve_future", json=body, headers={"accept": accept})

    return fetch
