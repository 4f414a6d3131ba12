"""The files that an external engine gets of an adapter."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from tx_async.storage.checkpoint_files import write_checkpoint_sync
from tx_async.storage.store import Store
from tx_async.worker.external_adapters import ADAPTER, ADAPTER_CONFIG, AdapterFolder

OURS = "base_model.model.model.layers.0.linear_attn.in_proj_qkv.lora_A.weight"
BESIDE_VISION = "base_model.model.model.language_model.layers.0.linear_attn.in_proj_qkv.lora_A.weight"


@pytest.mark.parametrize(("sees", "name"), [(False, OURS), (True, BESIDE_VISION)])
def test_modules_are_named_as_the_base_models_folder_has_them(sees, name, tmp_path):
    """Of a folder that sees, vLLM ignores the text model's own names without a word."""
    store, a = Store(str(tmp_path / "store")), np.arange(6, dtype=np.float32).reshape(2, 3)
    write_checkpoint_sync(store, "key", {ADAPTER: save({OURS: a}), ADAPTER_CONFIG: b"{}"}, {"kind": "sampler"})
    adapters = AdapterFolder(str(tmp_path / "adapters"), store, "w1")
    adapters.sees = sees
    _, folder = adapters.write("key", "/models/base")
    (found,) = load_file(f"{folder}/{ADAPTER}").items()
    assert found[0] == name and (found[1] == a).all()
    with open(f"{folder}/{ADAPTER_CONFIG}") as file:
        assert json.load(file)["base_model_name_or_path"] == "/models/base"
