"""200 live models on a server with 8 device slots: each trains as if it were alone, on the real engine."""

from pathlib import Path

import tinker

from tests.support.durability import batch, serving

MODELS = 200
SLOTS = 8
VISITS = 3
ALONE = (0, 77, 199)
"""Which of them are trained again with nobody beside them."""
FAITHFUL = {*ALONE, *range(10, 30)}
"""Which of them come for all visits; the others come twice."""


def create(service: tinker.ServiceClient, model: Path, seeds: list[int]) -> list[tinker.TrainingClient]:
    futures = [service.create_lora_training_client(str(model), rank=4, seed=seed) for seed in seeds]
    return [future.result() for future in futures]


def losses(trainers: dict[int, tinker.TrainingClient]) -> dict[int, list[float]]:
    """Of every visit. All runs are visited in turn, so that each has left the device before it is needed again."""
    futures = {seed: [] for seed in trainers}
    for visit in range(VISITS):
        for seed, trainer in trainers.items():
            if visit == 2 and seed not in FAITHFUL:
                continue
            futures[seed].append(trainer.forward_backward(batch(100 * seed + visit)[:1], "cross_entropy"))
            trainer.optim_step(tinker.AdamParams(learning_rate=0.01))
    return {seed: [future.result().metrics["loss:sum"] for future in run] for seed, run in futures.items()}


def test_200_models_on_8_slots_all_keep_training_correctly(tiny_qwen3: Path, tmp_path: Path):
    backend = {"max_lora_adapters": SLOTS}
    with (
        serving(tmp_path, tiny_qwen3, fake=False, backend=backend, snapshot_every_steps=100) as server,
        tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service,
    ):
        crowd = losses(dict(enumerate(create(service, tiny_qwen3, list(range(MODELS))))))
        alone = {seed: losses({seed: create(service, tiny_qwen3, [seed])[0]})[seed] for seed in ALONE}
        moved = len(list(tmp_path.glob("checkpoints/*/snapshots/*/metadata.json")))
    assert {seed: crowd[seed] for seed in ALONE} == alone
    assert len({tuple(run) for run in crowd.values()}) == MODELS
    assert moved >= MODELS - SLOTS
