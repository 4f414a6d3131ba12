"""A tenant's heartbeats beside another one's large bodies, with three real processes; how long they take is a
measurement, and `bench/heartbeat.py` takes it."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "heartbeat.py"


def test_large_bodies_are_all_accepted_and_heartbeats_go_on_beside_them():
    command = [sys.executable, str(BENCH), "--posts", "8", "--at-once", "4", "--bytes", "1000000", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.JSONDecoder().raw_decode(done.stdout)[0]
    assert measured["heartbeats"] > 0 and measured["mb_per_s"] > 0
