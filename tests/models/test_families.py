"""The table of families says the same everywhere."""

import re
from pathlib import Path

from tests.support import parity
from tx_async import base_model
from tx_async.models.families import FAMILIES
from tx_async.text_config import text_config


def test_the_server_knows_the_classes_that_workers_do():
    """It cannot import them: it starts without JAX."""
    assert set(base_model.ARCHITECTURES) == set(FAMILIES)


PAGE = (Path(__file__).parents[2] / "schemas" / "models.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")]


def classes_of(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def classes_in(cases) -> set[str]:
    return {case.config["architectures"][0] for case in cases}


def test_the_table_of_models_has_a_row_for_every_class():
    assert sorted(name for row in ROWS for name in classes_of(row[0])) == sorted(FAMILIES)


def test_the_table_says_what_the_tests_compare():
    """Of a class that sees, its text model."""
    compared, stored, live = map(classes_in, (parity.CASES, parity.FAMILIES, parity.LIVE))
    for row in ROWS:
        names = {name for name in classes_of(row[0]) if "ForConditional" not in name}
        assert bool(names) == bool(row[4]) and names <= compared, row
        expected = "yes" if names and names <= stored else "live" if names and names <= live else ""
        assert row[5:7] == [expected, expected], row


SEES = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "tie_word_embeddings": True,
    "quantization_config": {"quant_method": "fp8"},
    "vision_config": {"hidden_size": 1},
    "text_config": {"architectures": ["Gemma3ForCausalLM"], "vocab_size": 7, "tie_word_embeddings": False},
}


def test_of_a_folder_that_sees_sizes_are_the_texts_and_the_rest_is_the_folders():
    found = text_config(SEES)
    assert (found["vocab_size"], found["architectures"]) == (7, ["Gemma3ForConditionalGeneration"])
    assert (found["eos_token_id"], found["tie_word_embeddings"]) == ([1, 106], True)
    assert found["quantization_config"] == {"quant_method": "fp8"} and "vision_config" not in found
    own_eos = SEES | {"text_config": SEES["text_config"] | {"eos_token_id": 5}}
    assert text_config(own_eos)["eos_token_id"] == 5


def test_a_text_models_config_is_its_own():
    assert text_config({"vocab_size": 3}) == {"vocab_size": 3}
