"""A folder's tokenizer is looked at before anybody needs it."""

import pytest

from tx_async import base_model, tokenizer_files
from tx_async.testing.models import make_qwen3
from tx_async.wire.worker import EngineConfig


def test_a_tokenizer_that_is_there_is_no_problem(tiny_qwen3):
    assert tokenizer_files.problem_of(tiny_qwen3) == ""
    assert base_model.read(str(tiny_qwen3), "", EngineConfig()).tokenizer_problem == ""


def test_a_missing_tokenizer_is_named(tmp_path):
    make_qwen3(tmp_path, tokenizer=False)
    assert "tokenizer.json" in base_model.read(str(tmp_path), "", EngineConfig()).tokenizer_problem


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", ""), ("tokenizer.json", "{}"), ("tokenizer_config.json", "[")]
)
def test_a_broken_tokenizer_is_named(tmp_path, name, content):
    make_qwen3(tmp_path)
    (tmp_path / name).write_text(content)
    assert str(tmp_path / name) in tokenizer_files.problem_of(tmp_path)


@pytest.mark.parametrize("names", [("tokenizer.model",), ("vocab.json", "merges.txt")])
def test_tokenizers_of_other_kinds_are_left_to_the_worker(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("something")
    assert tokenizer_files.problem_of(tmp_path) == ""
