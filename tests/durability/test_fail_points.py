"""kill -9 just before and just after each await on journal, dispatch and storage; the run goes on, bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from tests.support import fail_points
from tests.support.durability import Told, reviving, serving, stored, train, wait_until
from tx_async.testing.server import ServerProcess

STEPS = 10
ONCE = ("files_list", "files_delete", "body_read", "result_read", "adapter_load", "adapter_save", "recovery")
COUNTS = dict.fromkeys(ONCE, 1) | {"journal_open": 1, "payload_write": 9, "accept": 6}
"""At which of its occasions in a life the point strikes; 4 for all others."""
CASES = {"server": fail_points.SERVER_POINTS, "worker": fail_points.WORKER_POINTS}


def read_old_result(server: ServerProcess) -> bool:
    """One that is in the journal only, since a newer one has taken its place in memory. False, because only the crash
    is of interest."""
    session = server.post("/api/v1/create_session", tags=[], sdk_version="0")[1]
    lora = {"rank": 4, "train_unembed": True, "train_mlp": True, "train_attn": True}
    model = server.get("/api/v1/get_server_capabilities")[1]
    if session and model:
        (name,) = [entry["model_name"] for entry in model["supported_models"]]
        ids = {"session_id": session["session_id"], "base_model": name, "lora_config": lora}
        promises = [server.post("/api/v1/create_model", model_seq_id=i, **ids)[1] for i in range(2)]
        if promises[0]:
            server.post("/api/v1/retrieve_future", request_id=promises[0]["request_id"])
    return False


@pytest.mark.parametrize("point", fail_points.SERVER_POINTS | fail_points.WORKER_POINTS)
def test_a_fail_point_names_a_function_that_is_there(point: str):
    owner, name = fail_points.owner_of(point)
    assert callable(getattr(owner, name))


@pytest.mark.parametrize("who", CASES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_through_a_crash_at_each_fail_point(
    fake_clean: tuple[Told, dict[str, str]],
    tiny_qwen3: Path,
    tmp_path_factory: pytest.TempPathFactory,
    side_by_side,
    request: pytest.FixtureRequest,
    who: str,
    when: str,
):
    def case(who: str, when: str) -> None:
        folder, points = tmp_path_factory.mktemp(f"{when}-{who}"), CASES[who]

        def left() -> list[str]:
            return [point for point in points if not (folder / point).exists()]

        specs = [f"{when}_{point}:{COUNTS.get(point, 4)}:{folder / point}" for point in points]
        environ = {fail_points.VARIABLE: ",".join(specs)}
        settings: dict[str, Any] = {"snapshot_every_steps": 3, "result_cache_bytes": 0}
        with serving(folder / "server", tiny_qwen3, environ=environ, **settings) as server, reviving(server):
            told = train(server.base_url, tiny_qwen3, STEPS)
            wait_until(lambda: not left() or read_old_result(server), timeout_s=15)
            wait_until(lambda: server.get("/api/v1/healthz")[0] == 200)
        assert told == fake_clean[0]
        assert stored(server) == fake_clean[1]

    side_by_side.run(request.node, case)
