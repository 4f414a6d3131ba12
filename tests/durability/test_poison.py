"""A request that kills the server whenever it runs is set aside after its second death in a replay."""

from pathlib import Path

import pytest
import tinker

from tests.support import fail_points
from tests.support.durability import batch, reviving, serving


def test_a_request_that_kills_every_life_fails_alone(tiny_qwen3: Path, tmp_path: Path):
    """It kills the life that accepted it, then two that replay it; the next one sets it aside and serves."""
    environ = {fail_points.POISON_VARIABLE: "9"}
    with (
        serving(tmp_path, tiny_qwen3, environ=environ) as server,
        reviving(server),
        tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service,
    ):
        trainer = service.create_lora_training_client(base_model=str(tiny_qwen3), rank=8, seed=1).result()
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1] * 9),
            loss_fn_inputs={
                "target_tokens": tinker.TensorData(data=[1] * 9, dtype="int64"),
                "weights": tinker.TensorData(data=[1.0] * 9, dtype="float32"),
            },
        )
        poisoned = trainer.forward_backward([datum], "cross_entropy")
        after = trainer.forward_backward(batch(0), "cross_entropy")
        with pytest.raises(tinker.RequestFailedError, match="ended the server 2 times"):
            poisoned.result()
        assert len(after.result().loss_fn_outputs) == 3
        trainer.optim_step(tinker.AdamParams(learning_rate=0.01)).result()
    log = server.log_path.read_text()
    assert log.count("it is set aside") == 1
