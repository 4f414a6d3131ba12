"""SDKs of earlier generations run the same program: 0.6.3 speaks JSON only, 0.18.2 reads protobuf, 0.25.0 writes it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("pig_latin.py")
SDKS = Path(__file__).parents[2] / ".cache" / "sdks"
INSTALL_S = 60

TORCH_STAND_IN = "class Tensor: ...\n"
"""0.6.3 imports torch, for custom losses; this program has none, so where torch is not installed a name will do."""


def install(version: str) -> Path:
    """A folder with that SDK alone: its dependencies are those of today's SDK, which are installed."""
    folder = SDKS / version
    if not (folder / "tinker").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--target", str(folder), f"tinker=={version}"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"tinker {version} cannot be installed here: {str(error.stderr or error)[-300:]}")
    if importlib.util.find_spec("torch") is None:
        (folder / "torch.py").write_text(TORCH_STAND_IN)
    return folder


@pytest.mark.parametrize("version", ["0.6.3", "0.18.2", "0.25.0"])
def test_an_earlier_sdk_trains_and_samples(server, tiny_qwen3, version):
    command = [sys.executable, str(PROGRAM), server.base_url, str(tiny_qwen3), "5e-3", "25"]
    environ = os.environ | {"PYTHONPATH": str(install(version)), "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environ)
    assert done.returncode == 0, f"{done.stdout[-400:]}\n{done.stderr[-4000:]}\n{server.log_tail()}"
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["sdk"] == version
    assert (np.diff(outcome["losses"][:6]) < 0).all()
    assert outcome["samples"] == [[answer] * 8 for answer in outcome["expected"]]
