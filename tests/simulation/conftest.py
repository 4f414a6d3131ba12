"""`--seeds N` runs more of them, `--seed K` one alone."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=1_000, help="simulated worlds to run (from seed 0 on)")
    parser.addoption("--seed", type=int, default=None, help="run this simulated world only")
