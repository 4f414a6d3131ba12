"""A tenant who trains and samples in plain JSON: it counts what the SDK would count, and everything must succeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support import clients
from tx_async.testing.server import ServerProcess

RESULT_S = 240.0


class Client(clients.Client):
    def __init__(self, server: ServerProcess, model: Path | str):
        super().__init__(server)
        self.model = str(model)
        self.num_samples = self.num_samplers = self.num_runs = 0
        #: training run -> its last seq_id
        self.seq_ids: dict[str, int] = {}
        self.base = self.sampler(base_model=self.model)

    def post(self, path: str, /, **body: Any) -> Any:
        status, answer = self.server.post(f"/api/v1/{path}", timeout_s=60, **body)
        assert status == 200, answer
        return answer

    def outcome(self, promise: dict[str, Any]) -> Any:
        answer = self.result(promise["request_id"], RESULT_S)
        assert "error" not in answer and "detail" not in answer, answer
        return answer

    # ---- sampling

    def sampler(self, **weights: str) -> str:
        self.num_samplers += 1
        body = {"session_id": self.session_id, "sampling_session_seq_id": self.num_samplers}
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
        ids = {"session_id": self.session_id, "base_model": self.model, "model_seq_id": self.num_runs}
        run = self.outcome(self.post("create_model", lora_config={"rank": rank, **groups}, **ids))["model_id"]
        self.seq_ids[run] = 0
        return run

    def _of_run(self, route: str, run: str, /, **body: Any) -> Any:
        self.seq_ids[run] += 1
        return self.outcome(self.post(route, model_id=run, seq_id=self.seq_ids[run], **body))

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
