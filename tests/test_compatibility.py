"""The commands of SkyRL tx's README, with `tx-async serve` for the name: they parse, and say what they mean here."""

import json
import logging
import shlex

import pytest

from tx_async import cli, compatibility, config
from tx_async.errors import ConfigError
from tx_async.wire.worker import EngineConfig

PIG_LATIN = "--base-model {model}"
SFT = """--base-model {model} --backend-config '{{"max_lora_adapters": 2, "max_lora_rank": 1, "tensor_parallel_size": 8,
    "train_micro_batch_size": 1}}'"""
MOE = """--base-model {model} --backend-config '{{"max_lora_adapters": 2, "max_lora_rank": 1, "expert_parallel_size": 8,
    "train_micro_batch_size": 1, "shard_attention_heads": false}}'"""
RL = """--base-model {model} --backend-config '{{"max_lora_adapters": 3, "max_lora_rank": 1, "tensor_parallel_size": 8,
    "train_micro_batch_size": 8, "sample_max_num_sequences": 256}}'"""
SEARCH_TOOL = """--port 8001 --base-model {model} --backend-config '{{"max_lora_adapters": 3, "max_lora_rank": 32,
    "tensor_parallel_size": 8, "train_micro_batch_size": 1, "sample_max_num_sequences": 128}}'"""
TWO_NODES = """--base-model {model} --backend-config '{{"max_lora_adapters": 3, "max_lora_rank": 1,
    "tensor_parallel_size": 4, "fully_sharded_data_parallel_size": 2, "train_micro_batch_size": 8,
    "sample_max_num_sequences": 256, "coordinator_address": "node0:7777", "num_processes": 2}}'"""
SECOND_NODE = '--coordinator-address "node0:7777" --num-processes 2 --process-id 1'


@pytest.fixture
def serve(tiny_qwen3, monkeypatch):
    """serve(flags) -> the configuration that `tx-async serve` would have."""
    monkeypatch.delenv(compatibility.DATABASE_VARIABLE, raising=False)

    def parse(flags: str) -> config.ServerConfig:
        arguments = shlex.split(flags.format(model=tiny_qwen3))
        return cli._load_config(cli.parser().parse_args(["serve", *arguments]))

    return parse


@pytest.mark.parametrize("flags", [PIG_LATIN, SFT, RL, SEARCH_TOOL])
def test_a_command_of_the_readme_means_what_it_says(serve, flags, tiny_qwen3, caplog):
    settings = serve(flags)
    assert settings.base_model == str(tiny_qwen3) and caplog.messages == []
    for key, value in json.loads(shlex.split(flags.format(model=""))[-1]).items() if "{" in flags[20:] else ():
        assert getattr(settings.backend_config, key) == value


def test_the_moe_command_says_what_happens_to_the_attention_heads(serve, caplog):
    settings = serve(MOE)
    assert settings.backend_config.expert_parallel_size == 8
    assert len(caplog.messages) == 1 and "backend_config.shard_attention_heads" in caplog.text


def test_the_two_node_commands_find_each_other(serve, caplog):
    settings = serve(TWO_NODES)
    assert settings.backend_config.num_processes == 2 and settings.worker_address == "tcp://0.0.0.0:7001"
    assert len(caplog.messages) == 1 and "node0" in caplog.text
    worker = cli.parser().parse_args(["worker", *shlex.split(SECOND_NODE)])
    assert cli._worker_address(worker) == "tcp://node0:7001" and worker.process_id == 1
    given = cli.parser().parse_args(["worker", "--connect", "tcp://a:1", *shlex.split(SECOND_NODE)])
    assert cli._worker_address(given) == "tcp://a:1"
    with pytest.raises(ConfigError, match="--connect"):
        cli._worker_address(cli.parser().parse_args(["worker"]))


def test_external_inference_is_taken_as_it_is(serve, caplog):
    settings = serve(
        """--external-inference-url "http://0.0.0.0:7999" --external-inference-api-key EMPTY
        --external-inference-lora-base /tmp/lora_models --forwarding-inference-max-connections 64"""
    )
    assert settings.external_inference_url == "http://0.0.0.0:7999"
    assert settings.external_inference_lora_base == "/tmp/lora_models"
    assert len(caplog.messages) == 1 and "forwarding_inference_max_connections" in caplog.text


def test_a_mesh_on_one_host_opens_no_door(serve):
    flags = (
        """--base-model {model} --backend-config '{{"coordinator_address": "localhost:7777", "num_processes": 2}}'"""
    )
    assert serve(flags).worker_address == ""


def test_flags_of_its_server_are_taken_under_our_names(serve, caplog):
    flags = "--backend jax --checkpoints-base /c --database-url sqlite:////d --host ::1 --port 9"
    settings = serve(flags + " --session-timeout-sec 300 --session-cleanup-interval-sec 30")
    assert (settings.checkpoints_base, settings.database_url, settings.host, settings.port) == (
        "/c",
        "sqlite:////d",
        "::1",
        9,
    )
    assert (settings.session_timeout_s, settings.retention_interval_s) == (300, 30) and caplog.messages == []


def test_never_is_a_long_time_and_says_so(serve, caplog):
    settings = serve("--session-timeout-sec -1 --session-cleanup-interval-sec=-1")
    assert settings.session_timeout_s == settings.retention_interval_s == compatibility.NEVER_S
    assert len(caplog.messages) == 2


def test_another_backend_is_refused(serve):
    with pytest.raises(ConfigError, match=r"'fsdp'.*jax"):
        serve("--backend fsdp")


def test_its_database_variable_counts_where_ours_is_not_given():
    skyrl = {"SKYRL_DATABASE_URL": "postgresql://u@h/d"}
    assert config.load({}, skyrl).database_url == "postgresql://u@h/d"
    assert config.load({}, skyrl | {"TX_DATABASE_URL": "sqlite:////x"}).database_url == "sqlite:////x"
    assert config.load({"database_url": "sqlite:////y"}, skyrl).database_url == "sqlite:////y"


#: every key of its JAX backend: (a value, whether a line says what happens instead)
JAX_BACKEND = {
    "max_lora_adapters": (32, False),
    "max_lora_rank": (32, False),
    "tensor_parallel_size": (1, False),
    "expert_parallel_size": (1, False),
    "fully_sharded_data_parallel_size": (1, False),
    "train_micro_batch_size": (0, False),
    "sample_max_num_sequences": (0, True),
    "enforce_eager": (True, True),
    "shard_attention_heads": (True, True),
    "gradient_checkpointing": (True, False),
    "mhc_expansion_rate": (1, True),
    "loss_chunk_size": (1024, True),
    "coordinator_address": (None, False),
    "num_processes": (None, False),
    "use_ray": (False, True),
    "ray_actor_options": ({"num_cpus": 1}, True),
    "ray_pg_bundles": ([{"CPU": 1}], True),
}


@pytest.mark.parametrize("key", JAX_BACKEND)
def test_every_key_of_its_backend_does_what_it_says_or_has_one_line(key, caplog):
    value, has_line = JAX_BACKEND[key]
    with caplog.at_level(logging.INFO):
        settings = config.load({"backend_config": json.dumps({key: value})}, {})
    assert len(caplog.messages) == has_line and (not has_line or f"backend_config.{key}" in caplog.text)
    if not has_line and value is not None:
        assert getattr(settings.backend_config, key) == value


def test_all_of_its_keys_at_once_leave_the_defaults(caplog):
    everything = {key: value for key, (value, _) in JAX_BACKEND.items()} | {"gradient_checkpointing": False}
    settings = config.load({"backend_config": json.dumps(everything)}, {})
    assert settings.backend_config == EngineConfig(max_lora_adapters=32, max_lora_rank=32)


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"backend_config": '{"max_lora_adapter": 3}'}, {}, "backend_config.max_lora_adapter .*max_lora_adapters"),
        ({"backend_config": '{"enforce_eagr": 3}'}, {}, "enforce_eagr .*enforce_eager"),
        ({"backend_config": '{"zzz": 3}'}, {}, "backend_config.zzz is unknown.$"),
        ({}, {"TX_BASE_MODLE": "m"}, "TX_BASE_MODLE.*Did you mean TX_BASE_MODEL"),
    ],
)
def test_a_key_that_is_nobodys_is_refused_with_the_nearest_name(flags, environ, message):
    with pytest.raises(ConfigError, match=message):
        config.load(flags, environ)


def test_a_key_of_the_file_that_is_nobodys_is_refused_with_the_nearest_name(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text("session_timeout = 3")
    with pytest.raises(ConfigError, match=r"config.toml: session_timeout is unknown. Did you mean session_timeout"):
        config.load({}, {"TX_CONFIG": str(file)})
