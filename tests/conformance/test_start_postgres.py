"""A PostgreSQL that refuses this server is one line and exit code 2."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_start_failures import assert_one_line, serve


@pytest.mark.parametrize(
    ("user", "database", "named"),
    [("postgres", "nowhere", "nowhere"), ("nobody_here", "postgres", "nobody_here")],
)
def test_an_absent_database_or_user_is_one_line(
    postgres_server, tiny_qwen3: Path, tmp_path: Path, user: str, database: str, named: str
):
    url = f"postgresql://{user}:secret@/{database}?host={postgres_server.folder}"
    done = serve(tiny_qwen3, "--data-dir", str(tmp_path), "--database-url", url)
    assert_one_line(done, named)
    assert not re.search("secret", done.stderr)
