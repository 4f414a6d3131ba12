"""kill -9 just before and just after each await on journal, dispatch and storage; the run goes on, bit for bit."""

from pathlib import Path

import pytest

from tx_async.testing import fail_points
from tx_async.testing.durability import Told, reviving, serving, stored, train, wait_until

STEPS = 10
COUNTS = {"files_delete": 1, "body_read": 1, "adapter_load": 1, "adapter_save": 1, "payload_write": 9, "accept": 6}
"""At which of its occasions in a life the point strikes; 4 for all others."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("points", [fail_points.SERVER_POINTS, fail_points.WORKER_POINTS], ids=["server", "worker"])
def test_a_run_through_a_crash_at_each_fail_point(
    fake_clean: tuple[Told, dict[str, str]], tiny_qwen3: Path, tmp_path: Path, when: str, points: dict[str, str]
):
    specs = [f"{when}_{point}:{COUNTS.get(point, 4)}:{tmp_path / point}" for point in points]
    environ = {fail_points.VARIABLE: ",".join(specs)}
    with (
        serving(tmp_path / "server", tiny_qwen3, environ=environ, snapshot_every_steps=3) as server,
        reviving(server),
    ):
        told = train(server.base_url, tiny_qwen3, STEPS)
        wait_until(lambda: server.get("/api/v1/healthz")[0] == 200)
    assert [point for point in points if not (tmp_path / point).exists()] == []
    assert told == fake_clean[0]
    assert stored(server) == fake_clean[1]
