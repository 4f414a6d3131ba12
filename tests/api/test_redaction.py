"""What tenants are told of a failure names no path, bucket or endpoint of the server."""

import pytest

from tx_async.api.redaction import Redaction
from tx_async.config import ServerConfig

CONFIG = ServerConfig(
    base_model="/models/Qwen3-8B",
    data_dir="/srv/tx",
    checkpoints_base="s3://team-bucket/checkpoints",
    database_url="postgresql://tx:secret@db.internal:5432/tx",
)


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("one~3 could not be written in s3://team-bucket/checkpoints: no", "one~3 could not be written in …: no"),
        ("Error performing PUT http://10.0.0.7:9000/team-bucket/x in 3 s", "Error performing PUT … in 3 s"),
        ("bucket team-bucket does not exist at 10.0.0.7:9000", "bucket … does not exist at …"),
        (
            "[Errno 28] No space left on device: '/srv/tx/checkpoints/.incoming/ab'",
            "[Errno 28] No space left on device: '…'",
        ),
        ("connect to db.internal failed (postgresql://tx:secret@db.internal:5432/tx)", "connect to … failed (…)"),
        ("FileNotFoundError: ~/x/y and /tmp/z, then [::1]:9000", "FileNotFoundError: … and …, then …"),
        ("tinker://run/weights/one is damaged: 3/4 of it", "tinker://run/weights/one is damaged: 3/4 of it"),
        ("and/or, 12:30, a ratio 1/2, /", "and/or, 12:30, a ratio 1/2, /"),
    ],
)
def test_paths_buckets_and_endpoints_are_hidden(reason, told):
    assert Redaction(CONFIG, "Qwen/Qwen3-8B")(reason) == told


def test_the_served_models_name_stays_even_where_it_is_a_path():
    redact = Redaction(CONFIG, "/models/Qwen3-8B")
    assert redact("/models/Qwen3-8B is not /models/Qwen3-32B") == "/models/Qwen3-8B is not …"
    assert (
        Redaction(CONFIG, "Qwen/Qwen3-8B")("base model /models/Qwen3-8B has no weights")
        == "base model … has no weights"
    )


def test_an_endpoint_of_the_environment_is_hidden(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio.lab:9000")
    assert Redaction(CONFIG, "")("minio.lab:9000 does not answer") == "… does not answer"


def test_a_base_model_that_was_served_before_is_still_named():
    redact = Redaction(CONFIG, "/models/Qwen3-8B-Base", lambda: {"/models/Qwen3-8B"})
    told = "run r belongs to the base model /models/Qwen3-8B; this server has /models/Qwen3-8B-Base"
    assert redact(told + ", read from /mnt/weights") == told + ", read from …"
