"""The order of the suite's files names files that are there."""

from pathlib import Path

import pytest

from tests.support import order


@pytest.mark.parametrize("file", order.LONGEST)
def test_a_file_that_comes_first_is_there(file):
    assert (Path(__file__).parent / file).is_file()
