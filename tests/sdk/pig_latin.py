"""A user's program, in the form that every generation of the SDK runs: prints its losses and samples as JSON.

usage: pig_latin.py BASE_URL BASE_MODEL LEARNING_RATE STEPS
"""

import json
import sys
from importlib.metadata import version

import numpy as np
import tinker
from tinker import types

base_url, base_model, learning_rate, steps = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])

service_client = tinker.ServiceClient(base_url=base_url, api_key="tml-dummy")
training_client = service_client.create_lora_training_client(base_model=base_model)
if hasattr(training_client, "result"):
    training_client = training_client.result()
tokenizer = training_client.get_tokenizer()

examples = [
    {"input": "banana split", "output": "anana-bay plit-say"},
    {"input": "quantum physics", "output": "uantum-qay ysics-phay"},
    {"input": "coding wizard", "output": "oding-cay izard-way"},
]


def process_example(example):
    prompt = f"English: {example['input']}\nPig Latin:"
    prompt_tokens = tokenizer.encode(prompt, add_special_tokens=True)
    prompt_weights = [0] * len(prompt_tokens)
    completion_tokens = tokenizer.encode(f" {example['output']}\n\n", add_special_tokens=False)
    completion_weights = [1] * len(completion_tokens)
    tokens = prompt_tokens + completion_tokens
    weights = prompt_weights + completion_weights
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens=tokens[:-1]),
        loss_fn_inputs=dict(weights=weights[1:], target_tokens=tokens[1:]),
    )


processed_examples = [process_example(example) for example in examples]
losses = []
for _ in range(steps):
    fwdbwd_future = training_client.forward_backward(processed_examples, "cross_entropy")
    optim_future = training_client.optim_step(types.AdamParams(learning_rate=learning_rate))
    fwdbwd_result = fwdbwd_future.result()
    optim_future.result()
    logprobs = np.concatenate([output["logprobs"].tolist() for output in fwdbwd_result.loss_fn_outputs])
    weights = np.concatenate([example.loss_fn_inputs["weights"].tolist() for example in processed_examples])
    losses.append(float(-np.dot(logprobs, weights) / weights.sum()))

sampling_client = training_client.save_weights_and_get_sampling_client(name="pig-latin-model")
if hasattr(sampling_client, "result"):
    sampling_client = sampling_client.result()
samples = []
for example in examples:
    prompt = types.ModelInput.from_ints(tokenizer.encode(f"English: {example['input']}\nPig Latin:"))
    params = types.SamplingParams(max_tokens=32, temperature=0.0, stop=["\n"])
    result = sampling_client.sample(prompt=prompt, sampling_params=params, num_samples=8).result()
    samples.append([tokenizer.decode(sequence.tokens).strip() for sequence in result.sequences])

expected = [example["output"] for example in examples]
print(json.dumps({"sdk": version("tinker"), "losses": losses, "samples": samples, "expected": expected}))
