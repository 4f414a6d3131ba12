"""What stable_reinforce needs of samples outlives the server that drew them."""

from pathlib import Path

import tinker

from tests.support.durability import kill_server, serving
from tests.support.recorded import datum_of

PROMPT = [1, 2, 3]


def test_a_batch_trains_on_sequences_that_were_sampled_before_a_crash(tiny_qwen3: Path, tmp_path: Path):
    """And the batch itself is replayed after another one, when the recordings would not be needed any more."""
    with (
        serving(tmp_path, tiny_qwen3) as server,
        tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service,
    ):
        trainer = service.create_lora_training_client(base_model=str(tiny_qwen3), rank=8, seed=1).result()
        sampler = trainer.save_weights_and_get_sampling_client(record_stability_info=True).result()
        params = tinker.SamplingParams(max_tokens=5, seed=5)
        (sequence,) = sampler.sample(tinker.ModelInput.from_ints(PROMPT), 1, params).result().sequences
        kill_server(server)
        data = [datum_of(PROMPT, sequence)]
        before = trainer.forward_backward(data, "stable_reinforce").result()
        kill_server(server)
        step = trainer.optim_step(tinker.AdamParams(learning_rate=0.1)).result()
        after = trainer.forward_backward(data, "stable_reinforce").result()
    assert step.metrics and after.metrics["loss:sum"] != before.metrics["loss:sum"]
