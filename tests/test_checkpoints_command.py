"""Which checkpoints `tx-async checkpoints delete` takes."""

from datetime import UTC, datetime, timedelta

import pytest

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
