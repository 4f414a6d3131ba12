"""`--kills N` runs more seeds of every killing test."""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.durability import Told, serving, stored, train
from tests.support.long_tests import long
from tx_async.testing.models import GPT_OSS_TINY, QWEN3_5_TINY, make_model
from tx_async.testing.sdk import UNCLOSED, collect_connections

FAKE_STEPS = 10
JAX_STEPS = 8
SIDE_BY_SIDE_MAX = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=1, help="seeds of every killing test")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kill_seed" in metafunc.fixturenames:
        metafunc.parametrize("kill_seed", range(metafunc.config.getoption("--kills", 1) or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The SDK leaves its sockets to the garbage collector, and here they are cut as well."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings(UNCLOSED))
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))


@pytest.fixture(autouse=True)
def sockets_of_the_sdk() -> Iterator[None]:
    """Found while the warnings about them are still ignored."""
    yield
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def connections_of_the_sdk() -> Iterator[None]:
    """The last ones too, before other tests begin."""
    yield
    collect_connections()


class SideBySide:
    """All cases of a test begin together, each with a server and a client of its own: they mostly wait, for processes
    to start and for the SDK's pauses. Each test then waits for its own case."""

    def __init__(self, items: list[pytest.Item], pool: ThreadPoolExecutor):
        self._items = items
        self._pool = pool
        #: node id of a test -> its case
        self._cases: dict[str, Future[None]] = {}

    def run(self, test: pytest.Item, case: Callable[..., None]) -> None:
        """`case` is called with the parameters of a test. Raises what it has raised for this one."""
        if test.nodeid not in self._cases:
            name = test.originalname  # type: ignore[attr-defined]
            for item in self._items:
                if item.path == test.path and getattr(item, "originalname", None) == name:
                    self._cases[item.nodeid] = self._pool.submit(case, **item.callspec.params)  # type: ignore[attr-defined]
        self._cases[test.nodeid].result()


@pytest.fixture(scope="session")
def side_by_side(request: pytest.FixtureRequest) -> Iterator[SideBySide]:
    with ThreadPoolExecutor(SIDE_BY_SIDE_MAX) as pool:
        yield SideBySide(request.session.items, pool)


@pytest.fixture(scope="session")
def fake_clean(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Told, dict[str, str]]:
    """What the uninterrupted run was told and has stored, with the engine that needs no JAX."""
    return uninterrupted(tmp_path_factory.mktemp("fake"), tiny_qwen3, fake=True, steps=FAKE_STEPS)


@pytest.fixture(scope="session", params=["qwen3_5", pytest.param("gpt_oss", marks=long)])
def jax_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a real worker serves here: a hybrid keeps recurrent state beside pages; with windows, sinks and experts on
    request."""
    longer = {"rope_scaling": GPT_OSS_TINY["rope_scaling"] | {"factor": 8.0}}
    configs = {
        "qwen3_5": QWEN3_5_TINY | {"layer_types": ["linear_attention", "full_attention"]},
        "gpt_oss": GPT_OSS_TINY | longer,
    }
    return make_model(tmp_path_factory.mktemp("model"), configs[request.param] | {"num_hidden_layers": 2})


@pytest.fixture(scope="session")
def jax_clean(jax_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Told, dict[str, str]]:
    return uninterrupted(tmp_path_factory.mktemp("jax"), jax_model, fake=False, steps=JAX_STEPS)


def uninterrupted(folder: Path, model: Path, fake: bool, steps: int) -> tuple[Told, dict[str, str]]:
    with serving(folder, model, fake=fake, snapshot_every_steps=3) as server:
        told = train(server.base_url, model, steps)
    return told, stored(server)
