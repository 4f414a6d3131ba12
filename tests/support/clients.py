"""A tenant in a few lines of plain HTTP, where the SDK's patience would hide what the server says."""

from __future__ import annotations

import itertools
import json
import time
import urllib.request
from typing import Any

from tx_async.testing.server import ServerProcess

ANSWER_S = 60.0


class Client:
    """One session of a server. Futures come back as their bodies: a result, or `{"error": …, "category": …}`."""

    def __init__(self, server: ServerProcess):
        self.server = server
        self._numbers = itertools.count()
        status, body = server.post("/api/v1/create_session", tags=[], user_metadata={}, sdk_version="0.38.0")
        assert status == 200, body
        self.session_id: str = body["session_id"]

    def create_model(self, base_model: str, rank: int = 4) -> str:
        answer = self.future(
            "create_model",
            session_id=self.session_id,
            model_seq_id=next(self._numbers),
            base_model=base_model,
            lora_config={"rank": rank, "seed": 1},
        )
        return answer["model_id"]

    def optim_step(self, model_id: str, seq_id: int) -> dict[str, Any]:
        return self.future("optim_step", model_id=model_id, seq_id=seq_id, adam_params={"learning_rate": 0.01})

    def save_weights(self, model_id: str, seq_id: int, name: str) -> dict[str, Any]:
        return self.future("save_weights", model_id=model_id, seq_id=seq_id, path=name)

    def load_weights(self, path: str) -> dict[str, Any]:
        """Into a run of its own."""
        number = next(self._numbers)
        return self.future("load_weights", session_id=self.session_id, model_seq_id=number, path=path, optimizer=False)

    def create_sampler(self, path: str) -> tuple[int, Any]:
        return self.server.post(
            "/api/v1/create_sampling_session",
            session_id=self.session_id,
            sampling_session_seq_id=next(self._numbers),
            model_path=path,
        )

    def training_runs(self) -> list[str]:
        request = urllib.request.Request(
            f"{self.server.base_url}/api/v1/training_runs", headers={"X-API-Key": "tml-dummy"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            return [run["training_run_id"] for run in json.load(response)["training_runs"]]

    def future(self, route: str, timeout_s: float = ANSWER_S, **body: Any) -> dict[str, Any]:
        """Submit and wait. A refusal at once is an answer, too."""
        status, accepted = self.server.post(f"/api/v1/{route}", **body)
        if status != 200:
            return {"status": status, **accepted}
        return self.result(accepted["request_id"], timeout_s)

    def submit(self, route: str, **body: Any) -> str:
        status, accepted = self.server.post(f"/api/v1/{route}", **body)
        assert status == 200, accepted
        return accepted["request_id"]

    def result(self, request_id: str, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while True:
            status, body = self.server.post("/api/v1/retrieve_future", timeout_s=60.0, request_id=request_id)
            if status not in (0, 408):
                return body
            assert time.monotonic() < deadline, f"no answer within {timeout_s} s: {body}"
            if status == 0:
                time.sleep(0.1)
