"""`bench/gpu.py` is run by whoever has a GPU for a short while: it must work the first time, and end in time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--tiny", "--json", *arguments]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_case_of_the_gpu_benchmark_gives_a_rate_and_a_share():
    answer = run()
    cases = {row["case"]: row for row in answer["results"]}
    assert set(cases) == {"train 2x128", "decode 1", "decode 8", "prefill 8"}
    for row in cases.values():
        assert row.get("tokens_per_s", 0) > 0 and row["share"] > 0, row
    assert answer["limits"]["matmul_gflops"] > 0 and answer["limits"]["memory_gb_per_s"] > 0


def test_when_the_time_is_over_it_says_what_it_did_not_reach():
    answer = run("--budget", "0")
    assert {row["skipped"] for row in answer["results"]} == {"not reached in time"}
