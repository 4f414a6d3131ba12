"""Folders that are wrong: one line that names file and field, from the server, the loader and doctor alike."""

import json
import subprocess
import sys

import pytest

from tx_async import base_model, model_folder
from tx_async.errors import BaseModelError
from tx_async.models import check
from tx_async.models.load import from_config
from tx_async.testing.models import QWEN3_TINY, make_qwen3
from tx_async.wire.worker import EngineConfig

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return make_qwen3(tmp_path)


def without(*keys, **changes):
    return json.dumps({key: value for key, value in (QWEN3_TINY | changes).items() if key not in keys})


def said_by(function, *arguments) -> str:
    with pytest.raises(BaseModelError) as caught:
        function(*arguments)
    assert "\n" not in caught.value.message
    return caught.value.message


BROKEN_CONFIGS = [
    ("[]", "config.json holds a list"),
    ("null", "config.json holds null"),
    ("", "config.json is not valid JSON"),
    ("{", "config.json is not valid JSON"),
    ('{"architectures": "Qwen3ForCausalLM"}', "architectures"),
    ('{"architectures": [7]}', "architectures"),
    (POINTER, "config.json is a git-lfs pointer"),
    (without("max_position_embeddings"), "config.json lacks max_position_embeddings"),
    (without(max_position_embeddings=None), "config.json lacks max_position_embeddings"),
    (without(max_position_embeddings="2048"), "config.json: max_position_embeddings is '2048'"),
    (without(max_position_embeddings=2048.5), "max_position_embeddings is 2048.5"),
    (without("vocab_size"), "config.json lacks vocab_size"),
    (without(vocab_size=None), "config.json lacks vocab_size"),
    (without(vocab_size=True), "vocab_size is True"),
    (without(hidden_size="64"), "config.json: hidden_size is '64'"),
    (without(hidden_size=-64), "hidden_size is -64"),
    (without(eos_token_id="<|endoftext|>"), "config.json: eos_token_id is '<|endoftext|>'"),
    (without(eos_token_id=[256, "x"]), "eos_token_id is [256, 'x']"),
    (without(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6'"),
    (without(rope_scaling="yarn"), "rope_scaling is 'yarn'"),
    (without(rope_scaling={"rope_type": "yarn", "factor": "4"}), "rope_scaling.factor is '4'"),
    (without(tie_word_embeddings="false"), "tie_word_embeddings is 'false'"),
    (without(quantization_config="fp8"), "quantization_config is 'fp8'"),
]


@pytest.mark.parametrize(("content", "words"), BROKEN_CONFIGS, ids=[words for _, words in BROKEN_CONFIGS])
def test_a_broken_config_is_named_with_its_field(folder, content, words):
    (folder / "config.json").write_text(content)
    line = said_by(base_model.read, str(folder), "", EngineConfig())
    assert (words in line and str(folder) in line) or words.startswith("architectures")


LOADER_CONFIGS = [
    (without("hidden_size"), "config.json: hidden_size is missing"),
    (without("num_hidden_layers"), "config.json: num_hidden_layers is missing"),
    (without(num_attention_heads=0, head_dim=None), "config.json"),
    (without(hidden_size=32), "config.json implies"),
    (without(rope_scaling={"rope_type": "yarn"}), "lacks 'factor'"),
    (without(rope_scaling={"rope_type": "spiral"}), "rope_type 'spiral'"),
]


@pytest.mark.parametrize(("content", "words"), LOADER_CONFIGS, ids=[words for _, words in LOADER_CONFIGS])
def test_what_only_the_loader_knows_is_one_line_too(folder, content, words, capsys):
    (folder / "config.json").write_text(content)
    line = said_by(check.check_folder, folder)
    assert words in line and str(folder) in line
    assert check.main(str(folder)) == 1 and words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "weight_map is None"),
        ("null", "holds null"),
        ("[]", "holds a list"),
        ('{"weight_map": {}}', "weight_map is {}"),
        ('{"weight_map": {"lm_head.weight": 7}}', "has 7 for lm_head.weight"),
        ('{"weight_map": {"lm_head.weight": "absent.safetensors"}}', "lacks absent.safetensors"),
        (POINTER, "git-lfs pointer"),
    ],
)
def test_an_index_that_is_there_but_broken_is_refused_although_the_weights_are_there(folder, content, words):
    (folder / INDEX).write_text(content)
    for function, arguments in ((base_model.read, (str(folder), "", EngineConfig())), (check.check_folder, (folder,))):
        assert words in said_by(function, *arguments)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER.encode(), "git-lfs pointer"),
        (b"", "truncated or not a safetensors file"),
        (b"\x02\0\0\0\0\0\0\0[]", "not a safetensors file"),
        (b'\x0f\0\0\0\0\0\0\0{"x": {"a": 1}}', "not a safetensors file"),
    ],
)
def test_broken_weights_are_named(folder, content, words):
    (folder / "model.safetensors").write_bytes(content)
    line = said_by(base_model.read, str(folder), "", EngineConfig())
    assert words in line and "model.safetensors" in line


def test_defaults_of_transformers_are_taken(folder):
    (folder / "config.json").write_text(without("rms_norm_eps", "eos_token_id"))
    assert from_config(model_folder.read_config(folder)).norm.eps == 1e-6
    assert base_model.read(str(folder), "", EngineConfig()).eos_token_ids == ()


def test_sliding_windows_that_no_layer_has_are_taken(folder):
    (folder / "config.json").write_text(without(use_sliding_window=True, sliding_window=64, max_window_layers=2))
    check.check_folder(folder)


# ---- the context


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({}, 2048),
        ({"rope_scaling": YARN}, 4096),
        ({"rope_scaling": YARN | {"type": "yarn"}}, 4096),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, 4096),
        ({"rope_parameters": YARN | {"rope_theta": 1e6}}, 4096),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 2048),
    ],
)
def test_yarn_lengthens_the_context_for_the_server_and_the_model(folder, changes, context):
    (folder / "config.json").write_text(without(**changes))
    assert base_model.read(str(folder), "", EngineConfig()).max_context_length == context
    assert from_config(model_folder.read_config(folder)).max_position_embeddings == context


def test_a_max_context_length_above_the_limit_is_refused_and_below_it_honoured(folder):
    assert base_model.read(str(folder), "", EngineConfig(max_context_length=512)).max_context_length == 512
    line = said_by(base_model.read, str(folder), "", EngineConfig(max_context_length=4096))
    assert "4096" in line and "2048" in line and "config.json" in line


# ---- the command line


@pytest.mark.parametrize(
    ("content", "words"),
    [("[]", "config.json holds a list"), (without("hidden_size"), "config.json: hidden_size is missing")],
)
def test_serve_ends_with_that_line_and_exit_code_2_and_doctor_says_the_same(folder, content, words, tmp_path_factory):
    (folder / "config.json").write_text(content)
    flags = ["--base-model", str(folder), "--data-dir", str(tmp_path_factory.mktemp("data")), "--port", "0"]
    run = [sys.executable, "-m", "tx_async.cli"]
    served = subprocess.run([*run, "serve", *flags], capture_output=True, text=True, timeout=200)
    assert served.returncode == 2, served.stderr
    line = served.stderr.strip().splitlines()[-1]
    assert words in line
    doctor = subprocess.run([*run, "doctor", *flags], capture_output=True, text=True, timeout=200)
    assert doctor.returncode == 1 and line.removeprefix("tx-async: ") in doctor.stdout
