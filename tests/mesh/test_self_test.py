"""A mesh on which one collective is wrong says which, on both hosts, and trains nothing."""

import asyncio

import pytest

from tests.support import xla
from tests.support.wrong_collective import WRONG_VARIABLE
from tx_async.config import ServerConfig
from tx_async.errors import BaseModelError
from tx_async.testing.dispatch import running_dispatch
from tx_async.testing.server import free_port
from tx_async.wire.worker import EngineConfig

START_S = 120


@pytest.mark.parametrize("wrong", ["all-gather", "all-reduce"])
async def test_a_wrong_collective_is_named_and_nothing_starts(wrong, tiny_qwen3, tmp_path, monkeypatch, capfd):
    """Only the last device, which is process 1's, sees the wrong value: process 0 is told."""
    monkeypatch.setenv(WRONG_VARIABLE, wrong)
    monkeypatch.setenv(*xla.flags(1).popitem())
    engine = EngineConfig(
        num_processes=2, coordinator_address=f"127.0.0.1:{free_port()}", fully_sharded_data_parallel_size=2
    )
    config = ServerConfig(base_model=str(tiny_qwen3), data_dir=str(tmp_path), local_workers=2, backend_config=engine)
    with pytest.raises(BaseModelError, match=rf"do not compute together: {wrong} over fsdp gives \d+"):
        async with running_dispatch(config, engine="tests.support.wrong_collective:create") as running:
            async with asyncio.timeout(START_S):
                while not any(process.exit_text for process in running.supervisor.processes):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
    said = capfd.readouterr().err
    assert f"wrong on this mesh: {wrong} over fsdp" in said
    other = "all-reduce" if wrong == "all-gather" else "all-gather"
    assert f"{other} over fsdp gives" not in said
