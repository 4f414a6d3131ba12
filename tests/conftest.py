"""What every test shares: JAX on the CPU with one compilation cache, tokenizers without network, no stray settings."""

import faulthandler
import importlib.util
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.support import order, xla

ROOT = Path(__file__).parents[1]

# Before anything imports JAX, transformers or the SDK: they read these once.
for _name in [name for name in os.environ if name.startswith(("TX_", "TINKER_"))]:
    del os.environ[_name]
os.environ |= {
    "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", xla.LIGHT),
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TINKER_TELEMETRY": "0",
    # Processes that tests start find tests/support, too.
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# How long an example takes is the machine's business: shared ones are slow at times.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("suite")

TEST_S = 300
"""A test that takes longer hangs: it fails with the stack of every thread."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_torch = importlib.util.find_spec("torch") is not None
    on_gpu = os.environ["JAX_PLATFORMS"] != "cpu"
    items.sort(key=lambda item: order.place_of(item.path.relative_to(ROOT / "tests").as_posix()))
    for item in items:
        if "torch" in item.keywords and not has_torch:
            item.add_marker(pytest.mark.skip(reason="torch is not installed"))
        if "gpu" in item.keywords and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: set JAX_PLATFORMS=cuda"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A guard by alarm signal: it costs nothing, and also ends a test that blocks the event loop."""

    def give_up(_number: int, _frame: object) -> None:
        faulthandler.dump_traceback()
        pytest.fail(f"did not end within {TEST_S} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(TEST_S)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two layers with a byte-level tokenizer. Read-only: all tests share it."""
    from tx_async.testing.models import make_qwen3

    return make_qwen3(tmp_path_factory.mktemp("models") / "qwen3-tiny")


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Without what the SDK says: its thread lives as long as the process, and speaks whichever test is running."""

    def is_not_the_sdks(record: logging.LogRecord) -> bool:
        return not record.name.startswith("tinker")

    caplog.handler.addFilter(is_not_the_sdks)
    yield caplog
    caplog.handler.removeFilter(is_not_the_sdks)
