"""kill -9 of the worker, the server, or both, at random moments of a run through the real SDK. The user's program knows
nothing of it, and everything that it was told and that is stored equals the uninterrupted run's, bit for bit."""

import os
import time
from pathlib import Path

import pytest

from tests.support.durability import Told, killing, serving, snapshots, stored, train, wait_until
from tx_async.scheduler.training.orphans import LOOK_AFTER_S
from tx_async.storage.local import INCOMING
from tx_async.storage.sweep import OLDER_THAN_S

FAKE_STEPS = 10
JAX_STEPS = 8
SNAPSHOTS_KEPT = 2
Clean = tuple[Told, dict[str, str]]


@pytest.mark.parametrize("kinds", [("worker",), ("server",), ("worker", "server", "both")], ids="-".join)
def test_a_run_through_kills_is_the_uninterrupted_run(
    fake_clean: Clean,
    tiny_qwen3: Path,
    tmp_path_factory: pytest.TempPathFactory,
    side_by_side,
    request: pytest.FixtureRequest,
    kinds: tuple[str, ...],
    kill_seed: int,
):
    def case(kinds: tuple[str, ...], kill_seed: int) -> None:
        with serving(tmp_path_factory.mktemp("server"), tiny_qwen3, snapshot_every_steps=3) as server:
            with killing(server, kill_seed, kinds, number=4, every_s=(0.1, 0.6)) as killed:
                told = train(server.base_url, tiny_qwen3, FAKE_STEPS, pace_s=0.25)
            server.wait_ready()
            # What was written just before a death is found and removed, though not at once.
            wait_until(lambda: len(snapshots(server)) <= SNAPSHOTS_KEPT, timeout_s=2 * LOOK_AFTER_S)
        assert len(killed) >= 2
        assert told == fake_clean[0]
        assert stored(server) == fake_clean[1]

    side_by_side.run(request.node, case)


def test_a_run_of_the_jax_engine_through_kills_is_the_uninterrupted_run(
    jax_clean: Clean, jax_model: Path, tmp_path: Path, kill_seed: int
):
    """A worker alone, then server and worker together, or the other way round."""
    with serving(tmp_path, jax_model, fake=False, snapshot_every_steps=3) as server:
        with killing(server, kill_seed, ("worker", "both"), number=2, every_s=(0.3, 2.5)) as killed:
            told = train(server.base_url, jax_model, JAX_STEPS, pace_s=0.4)
        server.wait_ready()
    assert sorted(killed) == ["both", "worker"]
    assert told == jax_clean[0]
    assert stored(server) == jax_clean[1]


def test_what_a_killed_writer_left_unfinished_is_removed(tiny_qwen3: Path, tmp_path: Path):
    unfinished = tmp_path / "checkpoints" / INCOMING / "unfinished"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"half")
    then = time.time() - OLDER_THAN_S - 60
    os.utime(unfinished, times=(then, then))
    with serving(tmp_path, tiny_qwen3):
        wait_until(lambda: not unfinished.exists())
