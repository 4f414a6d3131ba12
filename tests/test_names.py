"""What the base model is called."""

import pytest

from tx_async import base_model, config, names
from tx_async.wire.worker import EngineConfig


def test_the_first_name_is_reported_and_all_are_understood(tiny_qwen3):
    info = base_model.read(f"{tiny_qwen3}/", "Qwen/Qwen3-8B, my-model/", EngineConfig())
    assert info.name == "Qwen/Qwen3-8B"
    assert info.aliases == ("my-model", str(tiny_qwen3), tiny_qwen3.name)


def test_without_a_name_the_folder_is_one_without_its_slash(tiny_qwen3):
    info = base_model.read(f"{tiny_qwen3}/", "", EngineConfig())
    assert info.name == str(tiny_qwen3) and info.aliases == (tiny_qwen3.name,)


def test_a_list_of_names_in_a_file_is_that_of_a_flag(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('base_model_name = ["Qwen/Qwen3-8B", "other"]')
    assert names.listed(config.load({}, {"TX_CONFIG": str(file)}).base_model_name) == ("Qwen/Qwen3-8B", "other")
    assert names.listed(config.load({}, {"TX_BASE_MODEL_NAME": "a/b,c"}).base_model_name) == ("a/b", "c")


@pytest.mark.parametrize(
    ("name", "is_hub"),
    [("Qwen/Qwen3-0.6B", True), ("/models/x", False), ("./x", False), ("a/b/c", False), ("gpt", False)],
)
def test_hub_names(name, is_hub):
    assert names.is_hub_name(name) == is_hub


def test_the_tokenizer_is_where_the_setting_says_else_on_the_hub_else_in_the_folder(tiny_qwen3):
    folder = str(tiny_qwen3)
    assert names.tokenizer_id("org/tokenizer", folder, "Qwen/Qwen3-8B", folder) == "org/tokenizer"
    assert names.tokenizer_id("", folder, "mine,Qwen/Qwen3-8B", folder) == "Qwen/Qwen3-8B"
    assert names.tokenizer_id("", folder, "mine", folder) == folder
    assert names.tokenizer_id("", "Qwen/Qwen3-8B", "", "/hub/snapshots/x") == "Qwen/Qwen3-8B"
