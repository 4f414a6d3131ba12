"""A run's history through kill -9 of the server: as if nothing had happened."""

import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.durability import ServerProcess, serving, train

STEPS = 6
TIMES = ("started_at", "finished_at")


def history(server: ServerProcess) -> list[dict[str, float]]:
    _, listed = server.get("/dashboard/checkpoints")
    run = listed["checkpoints"][0]["path"].split("/")[2]
    _, answer = server.get(f"/dashboard/runs/{urllib.parse.quote(run)}")
    return answer["steps"]


def without_times(rows: list[dict[str, float]]) -> list[Mapping[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_a_history_survives_kills_without_gaps_and_duplicates(tiny_qwen3: Path, tmp_path: Path):
    with serving(tmp_path / "calm", tiny_qwen3, snapshot_every_steps=3) as server:
        train(server.base_url, tiny_qwen3, STEPS)
        calm = history(server)
    with serving(tmp_path / "killed", tiny_qwen3, snapshot_every_steps=3) as server:

        def kill() -> None:
            server.kill()
            server.start()

        train(server.base_url, tiny_qwen3, STEPS, pace_s=0.1, at={1: kill, 4: kill})
        server.wait_ready()
        killed = history(server)
        server.kill()
        server.start()
        server.wait_ready()
        assert history(server) == killed
    assert [row["index"] for row in killed] == list(range(STEPS))
    assert without_times(killed) == without_times(calm)
    assert all(row["tokens"] == 60 and row["finished_at"] >= row["started_at"] for row in killed)
