"""The fingerprint of a base model: equal for the same numbers wherever they lie, different for any others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.test_imports import DEVICE, modules_loaded_by
from tx_async.errors import BaseModelError
from tx_async.fingerprint import SAMPLE_BYTES, fingerprint


@pytest.fixture
def folder(tiny_qwen3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_qwen3, tmp_path / "copy"))


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_the_same_files_under_another_path_are_the_same_base(tiny_qwen3: Path, folder: Path):
    assert fingerprint(folder) == fingerprint(tiny_qwen3)


def test_the_same_tensors_in_other_files_are_the_same_base(tiny_qwen3: Path, folder: Path):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, some in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in some}, folder / file)
        weight_map |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert fingerprint(folder) == fingerprint(tiny_qwen3)


@pytest.mark.parametrize(
    ("values", "is_same"),
    [
        ({"rms_norm_eps": 1e-3}, False),
        ({"rope_theta": 5e5}, False),
        ({"num_attention_heads": 2}, False),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, False),
        ({"_name_or_path": "elsewhere", "transformers_version": "9.9", "use_cache": False}, True),
        ({"sliding_window": None}, True),
    ],
)
def test_of_the_configuration_what_changes_numbers_counts(folder: Path, values: dict, is_same: bool):
    before = fingerprint(folder)
    change_config(folder, **values)
    assert (fingerprint(folder) == before) is is_same


def test_rope_in_the_spelling_of_another_release_is_the_same(folder: Path):
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_theta")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint(folder) == before


def test_every_tensor_counts(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    before = fingerprint(folder)
    for name in tensors:
        changed = tensors[name].copy()
        changed.reshape(-1)[0] += 1
        save_file(tensors | {name: changed}, folder / "model.safetensors")
        assert fingerprint(folder) != before, name


def test_the_middle_and_the_end_of_a_large_tensor_count(folder: Path):
    tensor = np.zeros(4 * SAMPLE_BYTES, np.float32)
    save_file({"w": tensor}, folder / "model.safetensors")
    seen = {fingerprint(folder)}
    for place in (0, tensor.size // 2, tensor.size - 1):
        changed = tensor.copy()
        changed[place] = 1
        save_file({"w": changed}, folder / "model.safetensors")
        seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_a_folder_without_weights_has_none(folder: Path):
    (folder / "model.safetensors").unlink()
    assert fingerprint(folder) == ""


def test_a_damaged_file_is_named(folder: Path):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(BaseModelError, match=r"model\.safetensors"):
        fingerprint(folder)


def test_it_needs_no_jax():
    assert not modules_loaded_by("import tx_async.fingerprint, tx_async.identity") & {*DEVICE}
