"""The fake engine, with the time at which each optim_step finished among its metrics: `http_roundtrip.py` subtracts it
from the time at which the client had the answer. Both clocks are of one machine."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import numpy as np

from tx_async.testing.fake_engine import FakeEngine
from tx_async.testing.fake_engine import create as create_fake
from tx_async.wire.worker import Command, Heartbeat, Stepped, Welcome
from tx_async.worker.engine_api import Engine, Pending, Reply, ReportProgress


class StampingEngine:
    def __init__(self, engine: FakeEngine):
        self.info = engine.info
        self.close = engine.close
        self._engine = engine

    def vitals(self) -> Heartbeat:
        return self._engine.vitals()

    def execute(self, command: Command, tensors: Sequence[np.ndarray]) -> Pending:
        pending = self._engine.execute(command, tensors)

        def stamped() -> Reply:
            result, arrays = pending()
            if isinstance(result, Stepped):
                metrics = result.metrics | {"finished_at": time.time()}
                result = msgspec.structs.replace(result, metrics=metrics)
            return result, arrays

        return stamped


def create(welcome: Welcome, progress: ReportProgress) -> Engine:
    return StampingEngine(create_fake(welcome, progress))
