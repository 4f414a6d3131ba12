"""What is streamed is what the SDK samples: the same tokens and log-probabilities, bit for bit, of base and adapter."""

import json

import httpx
import numpy as np
import pytest
import tinker

PROMPT = [72, 101, 108, 108, 111, 44, 32]
HEADERS = {"Authorization": "Bearer tml-dummy"}


def streamed(server, model: str, n: int, **fields) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and log-probabilities of each choice; a piece of several tokens comes before the end."""
    tokens, logprobs = [[] for _ in range(n)], [[] for _ in range(n)]
    body = {"model": model, "prompt": PROMPT, "n": n, "stream": True, "ignore_eos": True, "logprobs": 0}
    body |= {"return_token_ids": True, "max_tokens": 20} | fields
    with httpx.stream(
        "POST", f"{server.base_url}/oai/api/v1/completions", json=body, headers=HEADERS, timeout=300
    ) as response:
        assert response.status_code == 200, response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    for line in lines:
        for choice in json.loads(line)["choices"]:
            tokens[choice["index"]] += choice["token_ids"] or []
            logprobs[choice["index"]] += (choice["logprobs"] or {}).get("token_logprobs") or []
    assert len(lines) > n
    return tokens, logprobs


@pytest.fixture(scope="module")
def adapter(server, tiny_qwen3) -> str:
    with tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service:
        trainer = service.create_lora_training_client(base_model=str(tiny_qwen3), rank=4).result()
        inputs = {"target_tokens": np.array([*PROMPT[1:], 33]), "weights": np.ones(len(PROMPT), np.float32)}
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints(PROMPT),
            loss_fn_inputs={key: tinker.TensorData.from_numpy(value) for key, value in inputs.items()},
        )
        trainer.forward_backward([datum], "cross_entropy").result()
        trainer.optim_step(tinker.AdamParams(learning_rate=0.05)).result()
        return trainer.save_weights_for_sampler(name="live").result().path


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_a_stream_says_what_the_sdk_samples(server, service, tiny_qwen3, adapter, which, temperature):
    name = str(tiny_qwen3)
    model = name if which == "base" else adapter
    weights = {"base_model": name} if which == "base" else {"model_path": adapter}
    sampler = service.create_sampling_client(**weights).result()
    params = tinker.SamplingParams(max_tokens=20, seed=7, temperature=temperature, top_p=0.95, stop=[])
    sampled = sampler.sample(tinker.ModelInput.from_ints(PROMPT), num_samples=3, sampling_params=params).result()
    tokens, logprobs = streamed(server, model, 3, seed=7, temperature=temperature, top_p=0.95)
    for index, sequence in enumerate(sampled.sequences):
        assert tokens[index] == list(sequence.tokens)
        assert np.array(logprobs[index], np.float32).tobytes() == np.array(sequence.logprobs, np.float32).tobytes()


def test_what_shapes_an_answer_reaches_the_device(server, tiny_qwen3):
    name = str(tiny_qwen3)
    (plain,), _ = streamed(server, name, 1, temperature=0.0)
    (biased,), _ = streamed(server, name, 1, temperature=0.0, logit_bias={str(plain[0]): -100})
    (forced,), _ = streamed(server, name, 1, temperature=0.0, logit_bias={"65": 100})
    (penalised,), _ = streamed(server, name, 1, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    assert plain[0] not in biased and forced == [65] * 20
    assert len(set(penalised)) >= len(set(plain))
