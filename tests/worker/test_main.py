"""The worker process and the signals that end it."""

import subprocess
import sys

INTERRUPTED_IN_A_DESTRUCTOR = """
import os, signal, time
from types import SimpleNamespace
from tx_async.worker.main import stop_on_signals

class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

stop_on_signals(SimpleNamespace(is_serving=False))
Slow()
time.sleep(60)
print("went on")
"""


def test_a_start_ends_at_a_signal_that_comes_where_exceptions_are_lost():
    command = [sys.executable, "-c", INTERRUPTED_IN_A_DESTRUCTOR]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "") and "Traceback" not in ended.stderr
