"""The long poll."""

import asyncio
import time

import msgspec

from tx_async.wire.results import TopkLogprobs

PROTOBUF = "application/x-protobuf"


async def optim_step(client, model_id, seq_id=1) -> str:
    body = {"model_id": model_id, "seq_id": seq_id, "adam_params": {}}
    return (await client.post("/api/v1/optim_step", json=body)).json()["request_id"]


async def test_a_poll_without_result_ends_with_408_and_the_queues_state(client, scheduler, model_id):
    scheduler.held = True
    request_id = await optim_step(client, model_id)
    response = await client.post("/api/v1/retrieve_future", json={"request_id": request_id})
    assert response.status_code == 408
    assert response.json()["queue_state"] == "active" and response.json()["request_id"] == request_id


async def test_a_result_answers_its_poll_at_once(client, scheduler, model_id):
    scheduler.held = True
    request_id = await optim_step(client, model_id)
    poll = asyncio.create_task(client.post("/api/v1/retrieve_future", json={"request_id": request_id}))
    await asyncio.sleep(0.01)
    started = time.perf_counter()
    scheduler.release()
    assert (await poll).json() == {"metrics": {"step": 1.0}}
    assert time.perf_counter() - started < 0.03


async def test_a_result_can_be_fetched_again_by_its_owner_only(client, other, model_id):
    request_id = await optim_step(client, model_id)
    for _ in range(2):
        assert (await client.post("/api/v1/retrieve_future", json={"request_id": request_id})).status_code == 200
    assert (await other.post("/api/v1/retrieve_future", json={"request_id": request_id})).status_code == 410


async def test_an_unknown_future_is_gone(client):
    response = await client.post("/api/v1/retrieve_future", json={"request_id": "r-none"})
    assert response.status_code == 410 and response.json()["category"] == "user"


async def test_a_large_result_tells_its_size_first_to_those_who_can_wait(client, sampler_id, scheduler):
    scheduler.base_model = msgspec.structs.replace(scheduler.base_model, max_context_length=8192)
    body = {
        "sampling_session_id": sampler_id,
        "seq_id": 0,
        "prompt": {"chunks": [{"tokens": [1] * 500}]},
        "num_samples": 64,
        "sampling_params": {"max_tokens": 5000},
    }
    request_id = (await client.post("/api/v1/asample", json=body)).json()["request_id"]
    poll = {"request_id": request_id, "allow_metadata_only": True}
    metadata = (await client.post("/api/v1/retrieve_future", json=poll, headers={"accept": PROTOBUF})).json()
    assert metadata["status"] == "complete_metadata" and metadata["response_payload_size"] > 2**20
    poll["allow_metadata_only"] = False
    result = await client.post("/api/v1/retrieve_future", json=poll, headers={"accept": PROTOBUF})
    assert result.headers["content-type"] == PROTOBUF and len(result.content) > 2**20


async def test_cancelling_reaches_the_scheduler(client, scheduler):
    assert (await client.post("/api/v1/cancel_future", json={"request_id": "r-1"})).status_code == 200
    assert scheduler.cancelled == ["r-1"]


def test_a_table_without_columns_has_no_rows():
    assert TopkLogprobs(b"", b"", 0).length == 0
