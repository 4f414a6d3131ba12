"""The table of families says the same everywhere."""

from tx_async import base_model
from tx_async.models.families import FAMILIES


def test_the_server_knows_the_classes_that_workers_do():
    """It cannot import them: it starts without JAX."""
    assert set(base_model.ARCHITECTURES) == set(FAMILIES)
