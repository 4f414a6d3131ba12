"""vLLM as a sampling worker: `tx-async worker --engine vllm --vllm-url http://127.0.0.1:8001 --vllm-lora-dir DIR`."""

from __future__ import annotations

from tx_async.wire.worker import Welcome
from tx_async.worker.engine_api import ReportProgress
from tx_async.worker.external import ExternalEngine
from tx_async.worker.external_settings import ExternalSettings
from tx_async.worker.vllm_http import VllmHttp


def create(welcome: Welcome, progress: ReportProgress, settings: ExternalSettings) -> ExternalEngine:
    """Wait for vLLM and try it. Raises `ConfigError` when it cannot sample for this server."""
    engine = ExternalEngine(lambda: VllmHttp(settings.url, settings.api_key), welcome, settings)
    try:
        engine.attach(progress)
    except BaseException:
        engine.close()
        raise
    return engine
