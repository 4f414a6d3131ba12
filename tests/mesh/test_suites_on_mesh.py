"""The suite of the real SDK, unchanged, against a server whose worker is a mesh of two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.long_tests import long

SDK = Path(__file__).parents[1] / "sdk"
SUITE_S = 290


@long
@pytest.mark.parametrize("suite", ["test_training.py", "test_many_clients.py"])
def test_the_suite_of_the_sdk_passes_on_a_mesh(suite, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path}/run",
        SDK / suite,
    ]
    environ = os.environ | {"SDK_TESTS_ON_MESH": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=SUITE_S, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout
