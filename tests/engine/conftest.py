"""Small engines on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tx_async.engine.engine import JaxEngine, create
from tx_async.testing.engine_bench import EngineBench
from tx_async.wire.worker import EngineConfig, Welcome

CONFIG: dict[str, Any] = {
    "max_lora_adapters": 4,
    "max_lora_rank": 8,
    "max_sampler_adapters": 2,
    "max_context_length": 128,
    "sample_max_num_sequences": 2,
    "train_row_lengths": (32, 64, 128),
    # As servers have it: of engines with the same programs, the first one compiles them, and the others trace nothing.
    "compilation_cache_dir": os.environ["JAX_COMPILATION_CACHE_DIR"],
}


@pytest.fixture
def make_bench(tiny_qwen3: Path, tmp_path: Path):
    """make_bench(**config) -> EngineBench; engines are closed at the end. lora_rank: what its slots must hold."""
    engines: list[JaxEngine] = []

    def make(lora_rank: int = 0, **config: Any) -> EngineBench:
        welcome = Welcome(
            base_model=str(tiny_qwen3),
            engine=EngineConfig(**CONFIG | config),
            checkpoints_base=str(tmp_path / "checkpoints"),
            heartbeat_interval_ms=1000,
            lease_ms=1000,
            lora_rank=lora_rank,
        )
        engines.append(create(welcome, lambda *_: None))
        return EngineBench(engines[-1])

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def bench(make_bench: Callable[..., EngineBench]) -> EngineBench:
    return make_bench()
