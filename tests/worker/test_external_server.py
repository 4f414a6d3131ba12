"""A whole server with a vLLM beside it: whatever that does, requests end, and it is taken back when it is well."""

import time

import httpx
import pytest

from tests.support.durability import serving, wait_until
from tests.support.raw_client import Client
from tx_async.config import ServerConfig
from tx_async.errors import ConfigError
from tx_async.testing.dispatch import running_dispatch
from tx_async.wire.facts import WorkerLost
from tx_async.worker.supervisor import external_engines

ATTACHED_AGAIN_S = 30.0


@pytest.fixture
def server(model, vllm, tmp_path):
    """Whose own worker is a fake engine: the same mathematics as the fake vLLM's."""
    with serving(tmp_path / "data", model, external_inference_url=vllm.url) as server:
        wait_until(lambda: is_trusted(server) or "is lost" in server.log())
        yield server


def is_trusted(server, times=1):
    """Its trial is over: the adapter that was made for it is deleted."""
    log = server.log()
    trials = list((server.data_dir / "checkpoints" / "external-trials").glob("*/metadata.json"))
    return log.count("worker vllm-127.0.0.1") and log.count(" is ready") >= 1 + times and not trials


def external_check(server):
    """A server whose engine outside is gone is well."""
    answer = httpx.get(f"{server.base_url}/api/v1/healthz?verbose", timeout=20)
    assert answer.status_code == 200, answer.text
    return answer.json()["checks"]["external"]


def test_samples_outlive_vllm_and_go_to_it_again_when_it_is_back(server, vllm, model):
    vllm.token_s = 0.02
    client = Client(server, model)
    promises = [client.ask(client.base) for _ in range(64)]
    wait_until(lambda: vllm.num_completions > 8)
    vllm.die()
    results = [client.outcome(promise) for promise in promises]
    assert all(len(result["sequences"][0]["tokens"]) == 20 for result in results)
    assert "this worker leaves" in server.log() and "Traceback" not in server.log()
    wait_until(lambda: external_check(server)["state"] == "warning")
    assert "worker vllm-127.0.0.1" in external_check(server)["text"]
    before = vllm.num_completions
    vllm.start()
    returned = time.monotonic()
    wait_until(lambda: vllm.num_completions > before and is_trusted(server, times=2))
    assert time.monotonic() - returned < ATTACHED_AGAIN_S
    assert external_check(server) == {"state": "ok", "text": "every engine is attached"}
    before = vllm.num_completions
    assert len(client.outcome(client.ask(client.base))["sequences"][0]["tokens"]) == 20
    assert vllm.num_completions == before + 1


def test_an_adapter_is_sampled_by_vllm_and_its_prompts_are_scored_here(server, vllm, model):
    client = Client(server, model)
    sampler = client.save(client.run(), "v1")
    before = vllm.num_completions
    sequence = client.outcome(client.ask(sampler, max_tokens=8))["sequences"][0]
    assert vllm.num_completions == before + 1 and len(vllm.adapters) == 1
    text = (1, 2, 3, *sequence["tokens"])
    scored = client.outcome(client.ask(sampler, text, max_tokens=1, prompt_logprobs=True))["prompt_logprobs"]
    assert vllm.num_completions == before + 1
    assert scored[3:] == pytest.approx(sequence["logprobs"], abs=1e-5)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [({"drops": ("lm_head",)}, "only a part of an adapter"), ({"off_by": 0.01}, "of the base model differ")],
    ids=["drops_the_unembedding", "other_weights"],
)
def test_a_vllm_that_computes_something_else_is_refused_with_the_reason(vllm, model, tmp_path, fault, reason):
    for attribute, value in fault.items():
        setattr(vllm, attribute, value)
    with serving(tmp_path / "data", model, external_inference_url=vllm.url) as server:
        wait_until(lambda: reason in server.log())
        client = Client(server, model)
        assert len(client.outcome(client.ask(client.base))["sequences"][0]["tokens"]) == 20


async def test_a_worker_whose_vllm_is_gone_says_so_in_one_line(vllm, model, tmp_path, capfd):
    config = ServerConfig(
        base_model=str(model), data_dir=str(tmp_path), local_workers=0, external_inference_url=vllm.url,
        worker_heartbeat_interval_ms=100, worker_lease_ms=5_000,
    )  # fmt: skip
    async with running_dispatch(config) as running:
        ready = await running.ready()
        assert ready.capabilities == {"sample"} and ready.info.continuous
        vllm.die()
        lost = await running.next(WorkerLost)
        assert "does not answer" in lost.reason
        vllm.start()
        assert (await running.ready()).worker_id == ready.worker_id
    said = capfd.readouterr().err
    assert "Traceback" not in said and said.count("this worker leaves") >= 1


def config(**fields):
    return ServerConfig(base_model="m", data_dir="/data", **fields)


def test_every_url_is_a_worker_of_its_own():
    url = "http://127.0.0.1:8001, http://127.0.0.1:8002/v1"
    names = [settings.name for settings in external_engines(config(external_inference_url=url))]
    assert names == ["vllm-127.0.0.1-8001", "vllm-127.0.0.1-8002"]
    assert external_engines(config()) == []


def test_adapters_lie_in_the_data_folder_unless_another_one_is_named():
    (settings,) = external_engines(config(external_inference_url="http://h:1"))
    assert settings.lora_dir == "/data/external_inference"
    (settings,) = external_engines(config(external_inference_url="http://h:1", external_inference_lora_base="/loras"))
    assert settings.lora_dir == "/loras"


def test_the_key_comes_from_a_file_and_stays_out_of_the_command_line(tmp_path):
    (tmp_path / "key").write_text("sesame\n")
    (settings,) = external_engines(
        config(external_inference_url="http://h:1", external_inference_api_key_file=str(tmp_path / "key"))
    )
    assert "sesame" not in settings.arguments and "sesame" in settings.environment.values()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"external_inference_url": "127.0.0.1:8001"}, "external_inference_url is '127.0.0.1:8001'"),
        ({"external_inference_url": "http://h:1", "external_inference_api_key_file": "/none"}, "cannot be read"),
    ],
)
def test_what_the_operator_can_change_is_one_line(fields, message):
    with pytest.raises(ConfigError, match=message):
        external_engines(config(**fields))
