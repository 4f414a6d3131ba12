"""The table of families says the same everywhere."""

import re
from pathlib import Path

from tx_async import base_model
from tx_async.models.families import FAMILIES


def test_the_server_knows_the_classes_that_workers_do():
    """It cannot import them: it starts without JAX."""
    assert set(base_model.ARCHITECTURES) == set(FAMILIES)


def test_the_table_of_models_has_a_row_for_every_class():
    page = (Path(__file__).parents[2] / "schemas" / "models.md").read_text()
    assert set(re.findall(r"`(\w+(?:ForCausalLM|ForConditionalGeneration))`", page)) == set(FAMILIES)
