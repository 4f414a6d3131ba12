"""The server's host: it serves with its own worker as process 0, and a client here trains and samples.

    python train_on_two_hosts.py <model> <folder> <own address>:<port> <own address>:<port of the coordinator>

Prints "ready", then for every line on stdin a line of losses and tokens, as JSON.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import tinker

from tx_async.testing.server import running_server

BACKEND = {
    "max_lora_adapters": 2, "max_lora_rank": 4, "max_sampler_adapters": 2, "max_context_length": 64,
    "sample_max_num_sequences": 2, "train_row_lengths": [32], "train_micro_batch_size": 2, "decode_steps": 4,
    "num_processes": 2, "fully_sharded_data_parallel_size": 2,
}  # fmt: skip


def main(model: str, folder: str, worker_address: str, coordinator_address: str) -> None:
    with (
        running_server(
            model, data_dir=Path(folder), worker_address=f"tcp://{worker_address}", snapshot_every_steps=2,
            backend_config=BACKEND | {"coordinator_address": coordinator_address},
            environ={name: value for name, value in os.environ.items() if name.startswith("TX_")},
            worker_heartbeat_interval_ms=500, worker_lease_ms=4000,
        ) as server,
        tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service,
    ):  # fmt: skip
        trainer = service.create_lora_training_client(base_model=model, rank=4, seed=1).result()
        print("ready", flush=True)
        for _ in sys.stdin:
            print(json.dumps([step(trainer), sample(trainer)]), flush=True)


def step(trainer: tinker.TrainingClient) -> float:
    """The same data every time: its loss falls."""
    tokens = np.random.default_rng(0).integers(0, 256, 21).tolist()
    inputs = {
        "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64"),
        "weights": tinker.TensorData(data=[1.0] * 20, dtype="float32"),
    }
    datum = tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    trained = trainer.forward_backward([datum], "cross_entropy")
    trainer.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    return trained.result().metrics["loss:sum"]


def sample(trainer: tinker.TrainingClient) -> list[int]:
    sampler = trainer.save_weights_and_get_sampling_client().result()
    params = tinker.SamplingParams(max_tokens=8, temperature=0.0)
    answer = sampler.sample(tinker.ModelInput.from_ints([5, 6, 7]), num_samples=1, sampling_params=params).result()
    return list(answer.sequences[0].tokens)


if __name__ == "__main__":
    warnings.simplefilter("ignore", ResourceWarning)
    main(*sys.argv[1:])
