"""`tx-async checkpoints`: list and delete one API key's checkpoints on a running server."""

from __future__ import annotations

import fnmatch
import urllib.parse
from collections import defaultdict
from collections.abc import Sequence

from tx_async import server_client
from tx_async.errors import ConfigError
from tx_async.wire.tinker import Checkpoint


def everything(base_url: str, api_key: str) -> list[Checkpoint]:
    """All checkpoints, newest first."""
    return server_client.everything(base_url, api_key, "/api/v1/checkpoints", "checkpoints", Checkpoint)


def doomed(
    checkpoints: Sequence[Checkpoint], patterns: Sequence[str], run: str, keep_last: int | None
) -> list[Checkpoint]:
    """The checkpoints that match (all, without patterns), except the newest `keep_last` of each run and kind.

    Raises `ConfigError` when nothing says which ones are meant, or a path without a * does not exist.
    """
    if not (patterns or run or keep_last is not None):
        raise ConfigError("Which checkpoints? Name paths, --run, or --keep-last.")
    if keep_last is not None and keep_last < 0:
        raise ConfigError(f"--keep-last is {keep_last}; it must not be negative.")
    known = {checkpoint.tinker_path for checkpoint in checkpoints}
    if missing := [pattern for pattern in patterns if "*" not in pattern and pattern not in known]:
        raise ConfigError(f"There is no checkpoint {missing[0]}.")
    matching = [c for c in checkpoints if _matches(c, patterns) and run in ("", _run_of(c))]
    kept: defaultdict[tuple[str, str], int] = defaultdict(int)
    going = []
    for checkpoint in sorted(matching, key=lambda c: (c.time, c.tinker_path), reverse=True):
        place = (_run_of(checkpoint), checkpoint.checkpoint_type)
        kept[place] += 1
        if kept[place] > (keep_last or 0):
            going.append(checkpoint)
    return going


def delete(base_url: str, api_key: str, checkpoint: Checkpoint) -> None:
    run = urllib.parse.quote(_run_of(checkpoint))
    path = f"/api/v1/training_runs/{run}/checkpoints/{checkpoint.checkpoint_id}"
    server_client.call(base_url, api_key, "DELETE", path)


def _matches(checkpoint: Checkpoint, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(checkpoint.tinker_path, pattern) for pattern in patterns)


def _run_of(checkpoint: Checkpoint) -> str:
    return checkpoint.tinker_path.removeprefix("tinker://").partition("/")[0]
