"""A hybrid through the SDK: what a snapshot of recurrent state brings back is what a server without any computes."""

import gc
import re
import urllib.request

import numpy as np
import pytest
import tinker

from tests.sdk.conftest import BACKEND
from tests.support.long_tests import long
from tx_async.testing.models import QWEN3_5_TINY, make_model
from tx_async.testing.sdk import UNCLOSED
from tx_async.testing.server import ServerProcess, running_server

HYBRID = QWEN3_5_TINY | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
SYSTEM = np.random.default_rng(0).integers(0, 256, 70).tolist()


def sampled(server: ServerProcess, model: str) -> list[tuple[list[int], bytes]]:
    """A prompt, one that goes on from it, and the first again, of base and adapter."""
    with tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service:
        trainer = service.create_lora_training_client(base_model=model, rank=4, seed=3).result()
        inputs = {"target_tokens": np.array(SYSTEM[1:]), "weights": np.ones(len(SYSTEM) - 1, np.float32)}
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints(SYSTEM[:-1]),
            loss_fn_inputs={key: tinker.TensorData.from_numpy(value) for key, value in inputs.items()},
        )
        trainer.forward_backward([datum], "cross_entropy").result()
        trainer.optim_step(tinker.AdamParams(learning_rate=0.05)).result()
        samplers = [
            service.create_sampling_client(base_model=model).result(),
            trainer.save_weights_and_get_sampling_client().result(),
        ]
        found = []
        for sampler in samplers:
            for prompt in (SYSTEM, [*SYSTEM, 1, 2, 3], SYSTEM):
                params = tinker.SamplingParams(max_tokens=12, seed=5, temperature=1.0, stop=[])
                asked = tinker.ModelInput.from_ints(prompt)
                answer = sampler.sample(asked, num_samples=2, sampling_params=params).result()
                found += [(list(s.tokens), np.array(s.logprobs, np.float32).tobytes()) for s in answer.sequences]
    gc.collect()
    return found


def hits(server: ServerProcess) -> float:
    with urllib.request.urlopen(f"{server.base_url}/metrics") as response:
        return float(re.search(r"^\S*prefix_cache_hit_tokens_total (\S+)$", response.read().decode(), re.M)[1])


@long
@pytest.mark.filterwarnings(UNCLOSED)
def test_the_prefix_cache_changes_no_bit_of_a_recurrent_model(tmp_path):
    model = make_model(tmp_path / "model", HYBRID)
    found = {}
    for on in (True, False):
        backend = BACKEND | {"prefix_cache": on}
        with running_server(model, data_dir=tmp_path / f"data-{on}", backend_config=backend) as server:
            found[on] = sampled(server, str(model))
            assert (hits(server) > 4 * 32) == on
    assert found[True] == found[False]
