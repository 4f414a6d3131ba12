"""`tx-async checkpoints export`."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save

from tests.support.durability import serving
from tx_async import cli
from tx_async.errors import ConfigError
from tx_async.export_command import without_unembed
from tx_async.storage.checkpoint_files import ADAPTER, ADAPTER_CONFIG
from tx_async.testing.sdk import UNCLOSED, collect_connections

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.lm_head.lora_A.weight"


def files(*names: str) -> dict[str, bytes]:
    tensors = {name: np.full((2, 2), i, np.float32) for i, name in enumerate(names)}
    config = {"r": 2, "target_modules": ["q_proj", "lm_head"]}
    return {ADAPTER_CONFIG: json.dumps(config).encode(), ADAPTER: save(tensors)}


def test_the_unembedding_s_part_is_left_out_of_tensors_and_modules():
    found = without_unembed(files(Q, HEAD))
    assert json.loads(found[ADAPTER_CONFIG]) == {"r": 2, "target_modules": ["q_proj"]}
    assert list(load(found[ADAPTER])) == [Q]


def test_an_export_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="nothing would be exported"):
        without_unembed(files(HEAD))


def test_a_file_where_the_folder_should_be_is_one_line_and_exit_code_2(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("tx_async.export_command._download", lambda *_: files(Q))
    (tmp_path / "file").touch()
    command = ["checkpoints", "export", "--base-url", "http://127.0.0.1:9", "tinker://run/weights/one", "--to"]
    for place in ("file", "file/below"):
        assert cli.main([*command, str(tmp_path / place)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(tmp_path / place) in said


@pytest.mark.filterwarnings(UNCLOSED)
def test_a_checkpoint_of_a_running_server_becomes_a_folder(tiny_qwen3: Path, tmp_path: Path, capsys):
    import tinker

    with serving(tmp_path / "server", tiny_qwen3) as server:
        with tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service:
            trainer = service.create_lora_training_client(base_model=str(tiny_qwen3), rank=4).result()
            path = trainer.save_state("one").result().path
        command = ["checkpoints", "export", "--base-url", server.base_url, "--api-key", "tml-dummy"]
        assert cli.main([*command, path, "--to", str(tmp_path / "out")]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
        assert (
            load_file(tmp_path / "out" / ADAPTER) and json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text())["r"]
        )
        for wrong in ([path, "--to", str(tmp_path / "out")], ["weights/one", "--to", str(tmp_path / "new")]):
            assert cli.main([*command, *wrong]) == 2
        assert cli.main([*command, path.replace("/one", "/two"), "--to", str(tmp_path / "new")]) == 2
        assert not (tmp_path / "new").exists()
    collect_connections()
