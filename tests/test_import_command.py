"""Adapters made elsewhere become checkpoints: on a running server, and in the data of one that stands still."""

import json
import stat

import numpy as np
import pytest
import tinker
from safetensors.numpy import load, save_file

from tests.support import parity
from tx_async import cli, import_command
from tx_async.errors import ConfigError, InvalidRequest
from tx_async.models import import_adapter
from tx_async.models.load import model_of
from tx_async.models.peft import from_peft, to_peft
from tx_async.testing.sdk import UNCLOSED, collect_connections
from tx_async.wire.worker import AdapterConfig

LORA = AdapterConfig(rank=3)
DATUM = tinker.Datum(
    model_input=tinker.ModelInput.from_ints([1, 2]),
    loss_fn_inputs={"target_tokens": tinker.TensorData(data=[2, 3], dtype="int64", shape=[2])},
)


@pytest.fixture(scope="module")
def model(tiny_qwen3):
    return model_of(tiny_qwen3)


@pytest.fixture
def write(model, tmp_path):
    """write(**changes of adapter_config.json) -> the folder of a PEFT adapter, alpha 8 where ours have 32."""

    def make(dtype=np.float32, **changes):
        tensors, settings = to_peft(model, parity.random_adapter(model, LORA), LORA)
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        save_file(
            {name: tensor.astype(dtype) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
        )
        settings |= {"lora_alpha": 8} | changes
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return folder

    return make


def converted(model, folder, names=("org/tiny",), max_rank=8):
    files, config = import_adapter.convert(model, folder, names, max_rank)
    (folder / "out.safetensors").write_bytes(files["adapter_model.safetensors"])
    tensors = import_adapter._tensors(folder / "adapter_model.safetensors")
    return files, config, tensors


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_alpha_is_scaled_to_ours_and_every_dtype_becomes_fp32(model, write, dtype):
    files, config, theirs = converted(model, write(dtype))
    settings = json.loads(files["adapter_config.json"])
    assert config.rank == 3 and settings["lora_alpha"] == 32 and settings["base_model_name_or_path"] == "org/tiny"
    ours, _ = from_peft(model, load(files["adapter_model.safetensors"]), settings)
    expected, _ = from_peft(model, theirs, settings | {"lora_alpha": 8})
    for stack, pairs in expected.items():
        for name, (a, b) in pairs.items():
            np.testing.assert_array_equal(ours[stack][name][0], a)
            np.testing.assert_allclose(ours[stack][name][1], b, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model_name_or_path": "org/another"}, "was made for org/another"),
        ({"r": None}, "r is None"),
        ({"r": 1000}, "lora_A has rank 3; .* gives 1000"),
        ({"r": 2}, "lora_A has rank 3; .* gives 2"),
        ({"rank_pattern": {"lm_head": 4}}, "lm_head.lora_A has rank 3; .* gives 4"),
        ({"rank_pattern": ["lm_head"]}, "rank_pattern is not an object"),
        ({"rank_pattern": {"(": 3}}, "not a regular expression"),
        ({"alpha_pattern": {"lm_head": 0}}, "lm_head.* is 0; it must be a number above 0"),
        ({"alpha_pattern": {"lm_head": None}}, "lm_head.* is None"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; it must be a number"),
        ({"lora_alpha": -8}, "lora_alpha is -8"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model, write, changes, words):
    with pytest.raises(InvalidRequest, match=words):
        import_adapter.convert(model, write(**changes), ("org/tiny",), 8)


def test_a_rank_above_the_servers_is_refused_with_the_setting(model, write):
    with pytest.raises(InvalidRequest, match="max_lora_rank"):
        import_adapter.convert(model, write(), ("org/tiny",), 2)


@pytest.mark.parametrize("base", ["org/tiny", "other-org/Tiny", "/somewhere/else", None])
def test_a_base_of_the_same_name_or_in_a_folder_is_told_by_its_shapes(model, write, base):
    import_adapter.convert(model, write(base_model_name_or_path=base), ("org/tiny",), 8)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("suffix", ["", ".age"])
def test_an_encrypted_adapter_is_to_be_decrypted_first(model, write, name, suffix):
    folder = write()
    (folder / name).unlink()
    (folder / (name + suffix)).write_bytes(b"age-encryption.org/v1\n-> X25519 ...")
    with pytest.raises(InvalidRequest, match=f"^{name}{suffix} is encrypted with age: decrypt"):
        import_adapter.convert(model, folder, ("org/tiny",), 8)
    with pytest.raises(ConfigError, match=f"{name}{suffix} is encrypted with age: decrypt"):
        import_command.adapters_in(folder, folder, "x")


# ---- the command


def test_a_refused_adapter_is_one_line_and_exit_code_2(write, tiny_qwen3, tmp_path, capsys):
    folder = write(use_dora=True)
    data = ["--data-dir", str(tmp_path / "data"), "--base-model", str(tiny_qwen3)]
    assert cli.main(["import", str(folder), "--as", "x", *data]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "use_dora" in said.err and said.err.count("\n") == 1
    (folder / "adapter_model.safetensors").unlink()
    assert cli.main(["import", str(folder), "--as", "x", *data]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err
    assert cli.main(["import", str(write()), "--as", "a name", *data]) == 2
    assert cli.main(["import", str(write()), "--as", "x", "--base-url", "http://127.0.0.1:9"]) == 2
    assert "cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ([], ("http://a", "tml-a")),
        (["--base-url", "http://b", "--api-key", "tml-b"], ("http://b", "tml-b")),
        (["--data-dir", "there"], ""),
        (["--base-model", "m/n"], ""),
    ],
)
def test_the_running_server_is_the_sdk_s_unless_data_are_named(flags, asked, tmp_path, monkeypatch):
    async def into_data(path, name, config, api_key):
        reached.append(api_key)
        return [], False

    reached = []
    monkeypatch.setattr(import_command, "over_http", lambda path, name, *server: reached.append(server) or [])
    monkeypatch.setattr(import_command, "into_data", into_data)
    monkeypatch.setenv("TINKER_BASE_URL", "http://a")
    monkeypatch.setenv("TINKER_API_KEY", "tml-a")
    monkeypatch.setenv("TX_BASE_MODEL", "m/n")
    assert cli.main(["import", str(tmp_path), "--as", "x", *flags]) == 0
    assert reached == [asked]


@pytest.mark.filterwarnings(UNCLOSED)
def test_what_was_imported_at_rest_is_there_when_the_server_runs(write, tiny_qwen3, tmp_path, capsys):
    """Into the data first, then over HTTP into the server that was started with them; a client uses both."""
    from tx_async.testing.server import running_server

    data = ["--data-dir", str(tmp_path / "data"), "--base-model", str(tiny_qwen3), "--api-key", "tml-mine"]
    assert cli.main(["import", str(write()), "--as", "first", *data]) == 0
    first, said = capsys.readouterr()
    assert first.startswith("tinker://") and first.endswith("/weights/first\n")
    assert said == f"tx-async: {tmp_path / 'data'} held no session before: is it the data of the server you mean?\n"
    data_dir = tmp_path / "data"
    open_to_others = [path for path in (data_dir, *data_dir.rglob("*")) if stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert not open_to_others
    with running_server(base_model=str(tiny_qwen3), data_dir=str(tmp_path / "data")) as server:
        url = ["--base-url", server.base_url, "--api-key", "tml-mine"]
        assert cli.main(["import", str(write()), "--as", "second", *url]) == 0
        second = capsys.readouterr().out
        assert cli.main(["import", str(write(use_dora=True)), "--as", "third", *url]) == 2
        assert "use_dora" in capsys.readouterr().err
        assert cli.main(["checkpoints", "list", *url]) == 0
        assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == [second.strip(), first.strip()]
        with tinker.ServiceClient(base_url=server.base_url, api_key="tml-mine") as service:
            prompt, params = (
                tinker.ModelInput.from_ints([1, 2, 3]),
                tinker.SamplingParams(max_tokens=4, temperature=0.0),
            )
            samplers = [service.create_sampling_client(model_path=path.strip()).result() for path in (first, second)]
            samples = [sampler.sample(prompt, 1, params).result().sequences[0].tokens for sampler in samplers]
            assert samples[0] == samples[1]
            trainer = service.create_training_client_from_state(first.strip()).result()
            assert trainer.forward_backward([DATUM], "cross_entropy").result().metrics["loss:sum"] > 0
        assert cli.main(["checkpoints", "delete", second.strip(), *url]) == 0
        assert capsys.readouterr().out == second
    collect_connections()
