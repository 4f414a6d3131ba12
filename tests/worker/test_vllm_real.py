"""Against a real vLLM: VLLM_VENV names a virtual environment that has one (`testing/vllm_process.py` says how), and
these tests start their own. Minutes, so not a part of the suite otherwise."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.support.durability import wait_until
from tx_async.testing.models import make_llama, make_qwen3
from tx_async.testing.server import running_server
from tx_async.testing.vllm_process import running_vllm

VENV = os.environ.get("VLLM_VENV", "")
TOLERANCE = 1e-4
PROMPT = [3, 1, 4, 1, 5]
SIZES = {
    "head_dim": 64, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256,
}  # fmt: skip
BACKEND = {"max_lora_adapters": 2, "max_lora_rank": 8, "max_sampler_adapters": 4, "max_context_length": 256}
ATTACHED_S = 600.0

pytestmark = [
    pytest.mark.skipif(not VENV, reason="needs a vLLM: set VLLM_VENV"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def served(request, tmp_path_factory):
    """(server, vLLM, a client): its vLLM is trusted."""
    import tinker

    folder = tmp_path_factory.mktemp(request.param)
    make = {"qwen3": make_qwen3, "llama": make_llama}[request.param]
    model = make(folder / "model", **SIZES)
    with (
        running_vllm(Path(VENV), model, folder / "vllm.log") as vllm,
        running_server(
            model, data_dir=folder / "data", backend_config=BACKEND, external_inference_url=vllm.url
        ) as server,
    ):
        wait_until(lambda: is_trusted(server, 1), ATTACHED_S)
        with tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service:
            yield server, vllm, service, str(model)


def is_trusted(server, times):
    trials = list((server.data_dir / "checkpoints" / "external-trials").glob("*/metadata.json"))
    return server.log().count("worker vllm-127.0.0.1") and server.log().count("serves") >= times and not trials


def sample(sampler, number=1, **fields):
    import tinker

    params = tinker.SamplingParams(**{"max_tokens": 16, "temperature": 0.0, "stop": []} | fields)
    return sampler.sample(tinker.ModelInput.from_ints(PROMPT), num_samples=number, sampling_params=params)


def check(sampler, **fields):
    """What vLLM sampled is, to our own worker, as likely as it says; and the likeliest where it was greedy."""
    import tinker

    sequence = sample(sampler, **fields).result().sequences[0]
    text = tinker.ModelInput.from_ints(PROMPT + list(sequence.tokens))
    params = tinker.SamplingParams(max_tokens=1)
    scored = sampler.sample(
        text, num_samples=1, sampling_params=params, include_prompt_logprobs=True, topk_prompt_logprobs=1
    ).result()
    ours = np.array(scored.prompt_logprobs[len(PROMPT) :])
    difference = np.abs(ours - np.array(sequence.logprobs)).max()
    assert difference <= TOLERANCE
    if fields.get("temperature", 0.0) == 0.0:
        likeliest = [candidates[0][0] for candidates in scored.topk_prompt_logprobs[len(PROMPT) :]]
        assert likeliest == list(sequence.tokens)
    return difference


def train(trainer, step):
    import tinker

    ids = np.random.default_rng(step).integers(0, 256, 12).tolist()
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": ids[1:], "weights": [1.0] * 11},
    )
    trainer.forward_backward([datum], "cross_entropy").result()
    trainer.optim_step(tinker.AdamParams(learning_rate=0.02)).result()


def test_base_and_adapters_are_sampled_as_our_own_worker_knows_them(served):
    _, vllm, service, model = served
    differences = {"base": check(service.create_sampling_client(base_model=model).result())}
    for name, groups in {"all modules": {}, "attention": {"train_mlp": False, "train_unembed": False}}.items():
        trainer = service.create_lora_training_client(base_model=model, rank=8, **groups).result()
        for step in range(3):
            train(trainer, step)
        sampler = trainer.save_weights_and_get_sampling_client().result()
        differences[name] = check(sampler)
        check(sampler, temperature=0.8, seed=5)
    print(f"largest differences: {differences}")
    assert "Loaded new LoRA adapter" in vllm.log.read_text()


def test_twelve_versions_take_turns_on_four_slots(served):
    _, _, service, model = served
    trainer = service.create_lora_training_client(base_model=model, rank=4).result()
    samplers = []
    for step in range(12):
        train(trainer, step)
        samplers.append(trainer.save_weights_and_get_sampling_client().result())
    asked = [sample(sampler, 2, temperature=1.0, seed=1) for sampler in samplers]
    assert all(len(future.result(timeout=240).sequences) == 2 for future in asked)
    assert max(check(sampler) for sampler in samplers[::4]) <= TOLERANCE


def test_kill_9_in_the_middle_of_64_samples(served):
    server, vllm, service, model = served
    sampler = service.create_sampling_client(base_model=model).result()
    asked = [sample(sampler, temperature=1.0, seed=number, max_tokens=128) for number in range(64)]
    asked[0].result(timeout=120)
    vllm.kill()
    results = [future.result(timeout=240) for future in asked]
    assert all(len(result.sequences[0].tokens) == 128 for result in results)
    assert "this worker leaves" in server.log() and "Traceback" not in server.log()
    vllm.start()
    vllm.wait_ready()
    wait_until(lambda: is_trusted(server, 2), 120)
