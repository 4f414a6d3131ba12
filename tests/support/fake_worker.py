"""The fake engine for worker processes of durability tests: `tx_async.testing.fake_engine` with fail points."""

from __future__ import annotations

from tests.support import fail_points
from tx_async.testing import fake_engine
from tx_async.wire.worker import Welcome
from tx_async.worker.engine_api import ReportProgress


def create(welcome: Welcome, progress: ReportProgress) -> fake_engine.FakeEngine:
    fail_points.install()
    return fake_engine.create(welcome, progress)
