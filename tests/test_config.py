"""Where settings come from, which source wins, and what is refused."""

import pytest

from tx_async.config import ServerConfig, load
from tx_async.errors import ConfigError
from tx_async.field_docs import field_docs
from tx_async.wire.worker import EngineConfig


def test_flags_win_over_the_environment_and_the_environment_over_the_file(tmp_path):
    file = tmp_path / "tx.toml"
    file.write_text('host = "1.1.1.1"\nport = 1\nlog_level = "debug"\n[backend_config]\nmax_lora_rank = 8\n')
    environ = {"TX_CONFIG": str(file), "TX_HOST": "2.2.2.2", "TX_PORT": "2"}
    config = load({"host": "3.3.3.3", "port": None}, environ)
    assert (config.host, config.port, config.log_level) == ("3.3.3.3", 2, "debug")
    assert config.backend_config == EngineConfig(max_lora_rank=8)


def test_defaults_work_without_any_source():
    assert load({}, {}) == ServerConfig()
    assert load({}, {}).resolved_database_url.startswith("sqlite:////")


def test_backend_config_comes_as_json_from_flag_and_environment():
    assert load({"backend_config": '{"max_lora_rank": 4}'}, {}).backend_config.max_lora_rank == 4
    assert load({}, {"TX_BACKEND_CONFIG": '{"max_lora_rank": 4}'}).backend_config.max_lora_rank == 4


@pytest.mark.parametrize(
    ("flags", "environ", "named"),
    [
        ({"backend_config": '{"max_lora_rnk": 4}'}, {}, "max_lora_rnk"),
        ({"backend_config": "{"}, {}, "backend_config"),
        ({"backend_config": "[]"}, {}, "backend_config"),
        ({"backend_config": '{"max_lora_rank": "many"}'}, {}, "max_lora_rank"),
        ({"port": "eighty"}, {}, "port"),
        ({"bodies_bytes_max": 0}, {}, "bodies_bytes_max is 0; it must be more than 0"),
        ({"long_poll_ms": "-1"}, {}, "long_poll_ms is -1; it must be at least 0"),
        ({}, {"TX_TRAIN_SHARE": "nan"}, "train_share is nan"),
        ({"backend_config": '{"tensor_parallel_size": 0}'}, {}, "backend_config.tensor_parallel_size is 0"),
        ({"backend_config": '{"kv_cache_tokens": -1}'}, {}, "backend_config.kv_cache_tokens is -1; .* at least 0"),
        ({"backend_config": '{"train_row_lengths": [64, 0]}'}, {}, "backend_config.train_row_lengths is 0"),
        ({}, {"TX_PROT": "80"}, "TX_PROT"),
        ({}, {"TX_PORT": "eighty"}, "port"),
        ({}, {"TX_CONFIG": "/nowhere/tx.toml"}, "/nowhere/tx.toml"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(flags, environ, named):
    with pytest.raises(ConfigError, match=named):
        load(flags, environ)


@pytest.mark.parametrize(("text", "named"), [("prot = 80", "prot"), ("port = ", "TOML"), ("port = 'x'", "port")])
def test_a_wrong_file_is_refused_by_name(tmp_path, text, named):
    (tmp_path / "tx.toml").write_text(text)
    with pytest.raises(ConfigError, match=named):
        load({}, {"TX_CONFIG": str(tmp_path / "tx.toml")})


@pytest.mark.parametrize("struct", [ServerConfig, EngineConfig])
def test_field_docs_know_every_field_its_type_and_default(struct):
    docs = field_docs(struct)
    assert [doc.name for doc in docs] == list(struct.__struct_fields__)
    assert all(doc.default == getattr(struct(), doc.name) for doc in docs)
    assert sum(bool(doc.doc) for doc in docs) > len(docs) / 2
