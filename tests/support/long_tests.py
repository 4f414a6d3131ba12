"""Tests that take minutes are left out, unless LONG_TESTS is set."""

import os

import pytest

ARE_ON = bool(os.environ.get("LONG_TESTS"))
long = pytest.mark.skipif(not ARE_ON, reason="takes minutes: set LONG_TESTS=1")
