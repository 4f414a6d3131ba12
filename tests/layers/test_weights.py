"""Layers fall into few scans, whatever their pattern."""

import pytest

from tx_async.layers.weights import stacks_of


@pytest.mark.parametrize(
    ("kinds", "segments"),
    [
        ("mmmm", [{"m": (0, 1, 2, 3)}]),
        ("dddmmmm", [{"d": (0, 1, 2)}, {"m": (3, 4, 5, 6)}]),
        ("dmdmdm", [{"d": (0, 2, 4), "m": (1, 3, 5)}]),
        ("ddmddm", [{"d": (0, 3), "d_2": (1, 4), "m": (2, 5)}]),
        ("dmmdmmmm", [{"d": (0, 3), "m": (1, 4), "m_2": (2, 5)}, {"m_3": (6, 7)}]),
        ("m", [{"m": (0,)}]),
    ],
)
def test_patterns_of_layers_become_scans_in_order(kinds, segments):
    found = stacks_of(tuple(kinds))
    assert [{stack.name: stack.layers for stack in segment} for segment in found] == segments
    assert sorted(i for segment in found for stack in segment for i in stack.layers) == list(range(len(kinds)))
    assert all(kinds[i] == stack.kind for segment in found for stack in segment for i in stack.layers)


def test_compile_time_follows_the_pattern_and_not_the_depth():
    assert len(stacks_of(("dense",) * 3 + ("moe",) * 58)) == 2
    assert len(stacks_of(("dense", "moe") * 24)) == 1
