"""Which checkpoints `tx-async checkpoints delete` takes, and of which server."""

from datetime import UTC, datetime, timedelta

import pytest

from tx_async import cli, server_client
from tx_async.checkpoints_command import doomed
from tx_async.errors import ConfigError
from tx_async.wire.tinker import Checkpoint

BEGAN = datetime(2026, 11, 1, tzinfo=UTC)


def checkpoint(run: str, name: str, minutes: int, kind="weights", kind_name="training") -> Checkpoint:
    return Checkpoint(
        checkpoint_id=f"{kind}/{name}",
        checkpoint_type=kind_name,
        time=BEGAN + timedelta(minutes=minutes),
        tinker_path=f"tinker://{run}/{kind}/{name}",
        size_bytes=1,
    )


ALL = [
    checkpoint("a", "one", 1),
    checkpoint("a", "two", 2),
    checkpoint("a", "three", 3),
    checkpoint("a", "sampler", 0, "sampler_weights", "sampler"),
    checkpoint("b", "one", 1),
    checkpoint("b", "two", 5),
]


def names(found):
    return sorted(checkpoint.tinker_path.removeprefix("tinker://") for checkpoint in found)


def test_the_newest_of_each_run_and_kind_stay():
    assert names(doomed(ALL, [], "", 1)) == ["a/weights/one", "a/weights/two", "b/weights/one"]
    assert names(doomed(ALL, [], "a", 2)) == ["a/weights/one"]
    assert names(doomed(ALL, [], "", 9)) == []


def test_paths_and_patterns():
    assert names(doomed(ALL, ["tinker://a/weights/one"], "", None)) == ["a/weights/one"]
    assert names(doomed(ALL, ["tinker://*/weights/one"], "", None)) == ["a/weights/one", "b/weights/one"]
    assert names(doomed(ALL, ["tinker://*/weights/*"], "b", 1)) == ["b/weights/one"]


@pytest.mark.parametrize(
    ("patterns", "run", "keep", "words"),
    [
        ([], "", None, "Which checkpoints"),
        (["tinker://c/weights/x"], "", None, "no checkpoint tinker://c"),
        ([], "", -1, "negative"),
    ],
)
def test_nothing_is_deleted_by_mistake(patterns, run, keep, words):
    with pytest.raises(ConfigError, match=words):
        doomed(ALL, patterns, run, keep)


@pytest.mark.parametrize(
    ("arguments", "environ", "asked"),
    [
        ([], {"TINKER_BASE_URL": "http://a", "TINKER_API_KEY": "tml-a"}, ("http://a", "tml-a")),
        (["--base-url", "http://b"], {"TINKER_BASE_URL": "http://a", "TINKER_API_KEY": "tml-a"}, ("http://b", "tml-a")),
        (["--base-url", "http://b", "--api-key", "tml-b"], {"TINKER_API_KEY": "tml-a"}, ("http://b", "tml-b")),
        (["--base-url", "http://b"], {}, ("http://b", "")),
    ],
)
def test_the_server_and_the_key_are_those_that_the_sdk_would_take(arguments, environ, asked, monkeypatch):
    calls = []
    monkeypatch.setattr(server_client, "call", lambda url, key, *_: calls.append((url, key)) or {})
    for name in ("TINKER_BASE_URL", "TINKER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["checkpoints", "list", *arguments]) == 0
    assert calls == [asked]
