import pytest

from tests.support.stage import Stage


@pytest.fixture
def stage() -> Stage:
    """A server with one worker, and session "s"."""
    return Stage()
