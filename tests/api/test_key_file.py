"""The file of API keys, followed by a running server."""

import os

import pytest

from tx_async.api.key_file import Key, KeyFile, format_line, format_time, read_keys
from tx_async.errors import ConfigError

A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    "line",
    ["tml-plain-key alice", "abc", "Z" * 64, f"{A} x role=root", f"{A} x expires=tomorrow", f"{A} x added=2026-13-01"],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line):
    file = tmp_path / "keys"
    file.write_text(f"# first\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_keys(file)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_an_error_at_start(tmp_path, content):
    if content:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyFile(str(tmp_path / "keys"))


def test_a_line_is_read_as_it_was_written(tmp_path):
    """Names keep their words, and what looks like a pair but is none."""
    keys = [
        Key(digest=A, name="alice's laptop a=b"),
        Key(digest=B, name="bob", role="admin", expires_at=4e9, added_at=1.5e9, owner="owner-1"),
    ]
    file = tmp_path / "keys"
    file.write_text("\n".join(map(format_line, keys)))
    assert list(read_keys(file).values()) == keys
    assert format_time(0) == "1970-01-01T00:00:00+00:00" and format_time(None) == ""


def test_a_time_without_a_zone_is_utc(tmp_path):
    (tmp_path / "keys").write_text(f"{A} x expires=1970-01-02")
    assert read_keys(tmp_path / "keys")[A].expires_at == 24 * 3600


def test_a_change_counts_from_the_next_look_on(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{A} alice\n")
    told = []
    keys = KeyFile(str(file), lambda before, after: told.append((set(before), set(after))))
    assert set(keys.current()) == {A} and told == []
    (tmp_path / "new").write_text(f"{A} alice\n{B} bob\n")
    os.replace(tmp_path / "new", file)
    assert set(keys.current()) == {A, B}
    file.write_text(f"{B} bob\n")
    assert set(keys.current()) == {B}
    assert told == [({A}, {A, B}), ({A, B}, {B})]


def test_a_file_that_is_broken_or_away_changes_nothing(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text(f"{A} alice\n")
    keys = KeyFile(str(file))
    file.write_text("tml-oops\n")
    assert set(keys.current()) == {A}
    file.unlink()
    assert set(keys.current()) == {A}
    assert caplog.text.count("stay as they were") == 2
    assert set(keys.current()) == {A} and caplog.text.count("stay as they were") == 2
    file.write_text(f"{B} bob\n")
    assert set(keys.current()) == {B}
