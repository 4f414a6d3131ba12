"""A client of plain JSON: it sends what the SDK would, one request at a time, and never pauses."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tx_async.testing.server import Server

RESULT_S = 240.0


class Client:
    def __init__(self, server: Server, model: Path | str):
        self.server = server
        self.model = str(model)
        self.session = self.post("create_session", tags=[], sdk_version="0")["session_id"]
        self.num_samples = self.num_samplers = self.num_runs = 0
        #: training run -> its last seq_id
        self.seq_ids: dict[str, int] = {}
        self.base = self.sampler(base_model=self.model)

    def post(self, path: str, /, **body: Any) -> Any:
        status, answer = self.server.post(f"/api/v1/{path}", timeout_s=60, **body)
        assert status == 200, answer
        return answer

    def result(self, promise: dict[str, Any]) -> Any:
        deadline = time.monotonic() + RESULT_S
        while time.monotonic() < deadline:
            status, answer = self.server.post("/api/v1/retrieve_future", timeout_s=60, request_id=promise["request_id"])
            if status == 200:
                assert "error" not in answer, answer
                return answer
        raise AssertionError("it never ended")

    # ---- sampling

    def sampler(self, **weights: str) -> str:
        self.num_samplers += 1
        body = {"session_id": self.session, "sampling_session_seq_id": self.num_samplers}
        return self.post("create_sampling_session", **body, **weights)["sampling_session_id"]

    def ask(
        self, sampler: str, tokens: Any = (1, 2, 3), max_tokens: int = 20, temperature: float = 1.0, **fields: Any
    ) -> Any:
        self.num_samples += 1
        params = {"max_tokens": max_tokens, "temperature": temperature, "seed": self.num_samples, "stop": []}
        body = {"num_samples": 1, "sampling_session_id": sampler, "seq_id": self.num_samples, "sampling_params": params}
        return self.post("asample", prompt={"chunks": [{"tokens": list(tokens)}]}, **body | fields)

    # ---- training

    def run(self, rank: int = 4, **groups: bool) -> str:
        self.num_runs += 1
        ids = {"session_id": self.session, "base_model": self.model, "model_seq_id": self.num_runs}
        run = self.result(self.post("create_model", lora_config={"rank": rank, **groups}, **ids))["model_id"]
        self.seq_ids[run] = 0
        return run

    def _of_run(self, route: str, run: str, /, **body: Any) -> Any:
        self.seq_ids[run] += 1
        return self.result(self.post(route, model_id=run, seq_id=self.seq_ids[run], **body))

    def train(self, run: str, ids: list[int], learning_rate: float = 0.02) -> None:
        """One step towards predicting these tokens."""
        inputs = {
            "target_tokens": {"data": ids[1:], "dtype": "int64", "shape": [len(ids) - 1]},
            "weights": {"data": [1.0] * (len(ids) - 1), "dtype": "float32", "shape": [len(ids) - 1]},
        }
        datum = {"model_input": {"chunks": [{"type": "encoded_text", "tokens": ids[:-1]}]}, "loss_fn_inputs": inputs}
        self._of_run("forward_backward", run, forward_backward_input={"data": [datum], "loss_fn": "cross_entropy"})
        adam = {"learning_rate": learning_rate, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
        self._of_run("optim_step", run, adam_params=adam)

    def save(self, run: str, name: str) -> str:
        """A sampler of the run as it is now."""
        return self.sampler(model_path=self._of_run("save_weights_for_sampler", run, path=name)["path"])
