"""What a light key gets beside a heavy one, by a real server: its time for ten micro-batches alone, and beside twenty
sessions of another key that each have far more queued.

    python bench/fairness.py [--sessions 20] [--queued 15] [--quantum-ms 100] [--json]

The engine's mathematics costs nothing here, and each micro-batch a stated time: what is measured is whose turn it is.
Two keys share the device, so the fair share is half of it and the light key may need twice its time; the promise is
that share and ten per cent.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/support is no part of the package

from tests.support.durability import serving
from tx_async.testing.faults import FAULTS_VARIABLE
from tx_async.testing.models import make_qwen3

MICRO_BATCHES = 10
FAIR = 2.0


class Key:
    """One tenant over HTTP."""

    def __init__(self, base_url: str, name: str, base_model: str):
        self._base_url, self._key, self._base_model = base_url, f"tml-{name}", base_model

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        headers = {"X-API-Key": self._key, "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._base_url}/api/v1/{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read())

    def new_run(self) -> str:
        """In a session of its own."""
        session = self.post("create_session")["session_id"]
        lora = {"rank": 4, "seed": 0}
        ids = {"session_id": session, "model_seq_id": 0, "base_model": self._base_model}
        return self.post("create_model", lora_config=lora, **ids)["model_id"]

    def forward_backward(self, model_id: str, seq_id: int) -> str:
        tokens = list(range(1, 21))
        ints, floats = {"dtype": "int64", "shape": [20]}, {"dtype": "float32", "shape": [20]}
        datum = {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
            "loss_fn_inputs": {"target_tokens": {"data": tokens, **ints}, "weights": {"data": [1.0] * 20, **floats}},
        }
        content = {"data": [datum], "loss_fn": "cross_entropy"}
        return self.post("forward_backward", model_id=model_id, seq_id=seq_id, forward_backward_input=content)[
            "request_id"
        ]

    def wait(self, request_id: str) -> None:
        while True:
            try:
                self.post("retrieve_future", request_id=request_id)
                return
            except urllib.error.HTTPError as error:
                if error.code != 408:
                    raise

    def time_of_micro_batches(self, model_id: str, first: int) -> float:
        began = time.perf_counter()
        requests = [self.forward_backward(model_id, seq_id) for seq_id in range(first, first + MICRO_BATCHES)]
        for request in requests:
            self.wait(request)
        return time.perf_counter() - began


def measure(base_url: str, base_model: str, sessions: int, queued: int, quantum_s: float) -> dict[str, float]:
    light, heavy = Key(base_url, "light", base_model), Key(base_url, "heavy", base_model)
    mine = light.new_run()
    light.wait(light.forward_backward(mine, 1))  # its adapter is there: putting it there is no micro-batch
    alone = light.time_of_micro_batches(mine, 2)

    def fill(model_id: str) -> None:
        for seq_id in range(2, queued + 2):
            heavy.forward_backward(model_id, seq_id)

    def start(_: int) -> str:
        model_id = heavy.new_run()
        heavy.wait(heavy.forward_backward(model_id, 1))
        return model_id

    with ThreadPoolExecutor(sessions) as pool:
        runs = list(pool.map(start, range(sessions)))
        began = time.perf_counter()
        list(pool.map(fill, runs))
        beside = light.time_of_micro_batches(mine, 2 + MICRO_BATCHES)
    if time.perf_counter() - began > sessions * queued * quantum_s:  # the device cannot have done it sooner
        raise SystemExit("the heavy key may have had too little queued: raise --queued")
    return {"alone_s": alone, "beside_s": beside, "ratio": beside / alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=20, help="of the heavy key")
    parser.add_argument("--queued", type=int, default=15, help="micro-batches of each of them")
    parser.add_argument("--quantum-ms", type=float, default=100.0, help="what each takes on the device")
    parser.add_argument("--json", action="store_true", help="print every number, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_qwen3(Path(folder) / "model" / "tiny")
        environ = {FAULTS_VARIABLE: json.dumps({"command_ms": options.quantum_ms})}
        backend = {"train_micro_batch_size": 1, "max_lora_adapters": 32}
        with serving(Path(folder) / "server", model, environ=environ, backend=backend) as server:
            result = measure(server.base_url, str(model), options.sessions, options.queued, options.quantum_ms / 1000)
    if options.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    print(
        f"ten micro-batches of a light key: {result['alone_s']:.2f} s alone, {result['beside_s']:.2f} s beside "
        f"{options.sessions} sessions of a heavy one: {result['ratio']:.2f} times (the fair share is {FAIR:.0f} times)"
    )


if __name__ == "__main__":
    main()
