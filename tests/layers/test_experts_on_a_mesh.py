"""On a mesh each device multiplies the blocks of its own experts, in the kernels, and the results are summed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import xla
from tx_async.engine.kernels import TOLERANCE

SCRIPT = Path(__file__).with_name("experts_on_eight_devices.py")


@pytest.fixture(scope="module")
def found():
    environ = os.environ | xla.flags(8) | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_device_runs_the_kernels_on_its_own_experts_and_features_and_they_equal_the_plain_version(found):
    """Gradients by adapters and inputs included. Shapes: of a device's gate matrices."""
    shapes = {"1,4,2": [[2, 64, 48]], "2,2,2": [[4, 64, 48]]}
    assert {mesh: of_mesh["shapes"] for mesh, of_mesh in found.items() if mesh != "narrow"} == shapes
    assert max(found[mesh]["difference"] for mesh in shapes) <= TOLERANCE


def test_a_layer_exchanges_one_sum_forward_and_one_back(found):
    """On a CPU the gradients of A, which are sums over the tensor axis, travel with it."""
    assert found["1,4,2"]["sums"] == 2


def test_a_row_in_training_keeps_its_bits_beside_another_tenants_nan(found):
    assert found["1,4,2"]["row 0 keeps its bits"] and found["1,4,2"]["row 1 is NaN"]


def test_a_decoding_row_keeps_its_bits_beside_another_adapters_nan(found):
    assert found["2,2,2"]["others keep their bits"] and found["2,2,2"]["the adapter's rows are NaN"]


def test_shares_of_features_too_narrow_for_the_kernels_run_plainly(found):
    assert found["narrow"] == []
