"""The main job: the SDK's well-known example, unmodified, against a real server."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("pig_latin.py")


def run(python: str | Path, server, base_model: Path, learning_rate: float, steps: int) -> dict:
    command = [str(python), str(PROGRAM), server.base_url, str(base_model), str(learning_rate), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stderr[-4000:]}\n{server.log_tail()}"
    return json.loads(done.stdout.splitlines()[-1])


def test_six_rounds_at_a_small_learning_rate_lower_the_loss_every_time(server, tiny_qwen3):
    outcome = run(sys.executable, server, tiny_qwen3, 1e-4, 6)
    assert len(outcome["losses"]) == 6
    assert (np.diff(outcome["losses"]) < 0).all(), outcome["losses"]
    assert all(len(samples) == 8 for samples in outcome["samples"])


def test_more_rounds_at_a_larger_learning_rate_teach_the_right_answers(server, tiny_qwen3):
    """Greedy samples of one prompt are equal, and right."""
    outcome = run(sys.executable, server, tiny_qwen3, 5e-3, 40)
    assert outcome["losses"][-1] < 0.05
    assert outcome["samples"] == [[answer] * 8 for answer in outcome["expected"]]


@pytest.mark.parametrize("rank", [1, 32])
def test_every_rank_up_to_the_maximum_learns(service, tiny_qwen3, rank):
    from tx_async.demo import train

    trainer = service.create_lora_training_client(base_model=str(tiny_qwen3), rank=rank, seed=3).result()
    losses = train(trainer, 4, 1e-3)
    assert (np.diff(losses) < 0).all()
