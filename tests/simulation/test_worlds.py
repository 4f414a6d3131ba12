"""Seeded worlds: the real scheduler and the real records against crashes, stalls, repetitions and reordering. After
every event the invariants hold; in the end every accepted request has ended once, and every number that a client saw or
that lies on disk equals the reference's."""

import pytest

from tests.support.reference import Reference
from tests.support.simulation import World

EVENTS = 150
SEEDS = 1_000
"""By default; `--seeds N` on the command line of `pytest tests/simulation`."""
SEEDS_PER_TEST = 50


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" not in metafunc.fixturenames:
        return
    one = metafunc.config.getoption("--seed", None)
    number = metafunc.config.getoption("--seeds", SEEDS) or SEEDS
    chunks = [range(one, one + 1)] if one is not None else []
    if one is None:
        chunks = [range(i, min(i + SEEDS_PER_TEST, number)) for i in range(0, number, SEEDS_PER_TEST)]
    metafunc.parametrize("seeds", chunks, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")


def run(seed: int) -> World:
    world = World.varied(seed)
    for _ in range(EVENTS):
        world.act()
    world.quiesce()
    world.tidy()
    reference = Reference(world)
    reference.check()
    return world


def test_every_request_ends_once_and_every_number_is_the_reference_s(seeds: range):
    for seed in seeds:
        try:
            run(seed)
        except Exception as error:
            again = f"pytest tests/simulation --seed {seed}"
            raise AssertionError(f"seed {seed}: {error!r}. Again: {again}") from error


def test_a_seed_is_one_run():
    first, second = run(17), run(17)
    assert first.disk.tables == second.disk.tables
    assert first.seen == second.seen
    assert first.storage.files == second.storage.files


def test_the_worlds_are_worth_it():
    """Faults do happen, and most requests succeed in spite of them."""
    worlds = [run(seed) for seed in range(40)]
    finished = sum(len(world.disk.tables["result"]) for world in worlds)
    failed = sum(entry.failed for world in worlds for entry in world.catalog.results.values())
    assert finished > 1_500 and failed < finished / 2
    assert sum(world.num_crashes for world in worlds) > 60
    assert sum(world.num_widenings for world in worlds) > 10
    assert sum(bool(model.snapshots) for world in worlds for model in world.catalog.models.values()) > 20
