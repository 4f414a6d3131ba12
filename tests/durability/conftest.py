"""`--kills N` runs more seeds of every killing test."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tx_async.testing.durability import Told, serving, stored, train

FAKE_STEPS = 10
JAX_STEPS = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=1, help="seeds of every killing test")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kill_seed" in metafunc.fixturenames:
        metafunc.parametrize("kill_seed", range(metafunc.config.getoption("--kills", 1) or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The SDK leaves its sockets to the garbage collector, and here they are cut as well."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))


@pytest.fixture(autouse=True)
def sockets_of_the_sdk() -> Iterator[None]:
    """Found while the warnings about them are still ignored."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def fake_clean(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Told, dict[str, str]]:
    """What the uninterrupted run was told and has stored, with the engine that needs no JAX."""
    return uninterrupted(tmp_path_factory.mktemp("fake"), tiny_qwen3, fake=True, steps=FAKE_STEPS)


@pytest.fixture(scope="session")
def jax_clean(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Told, dict[str, str]]:
    return uninterrupted(tmp_path_factory.mktemp("jax"), tiny_qwen3, fake=False, steps=JAX_STEPS)


def uninterrupted(folder: Path, model: Path, fake: bool, steps: int) -> tuple[Told, dict[str, str]]:
    with serving(folder, model, fake=fake, snapshot_every_steps=3) as server:
        told = train(server.base_url, model, steps)
    return told, stored(server)
