"""Rows are nearly full, and who goes where is a function of the sizes."""

import numpy as np
import pytest

from tx_async.scheduler.training.placement import Contents, Placement

LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)


def placement_of(sizes: list[int]) -> Placement:
    return Placement(sizes, LENGTHS, preferred=1024, overhead=25)


def mixed(seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(32, 513, 16).tolist()


def cost(placement: Placement, contents: Contents) -> int:
    return sum(placement.length_of(content) + placement.overhead for content in contents)


def test_rows_of_mixed_sizes_are_nearly_full():
    filled = []
    for placement in map(placement_of, map(mixed, range(20))):
        contents = placement.of_own_micro_batches()
        filled.append(sum(placement.sizes) / sum(map(placement.length_of, contents)))
    assert np.mean(filled) > 0.965


@pytest.mark.parametrize("seed", range(5))
def test_a_row_for_each_costs_no_less(seed):
    placement = placement_of(mixed(seed))
    tried = cost(placement, placement.of_own_micro_batches())
    assert tried <= cost(placement, placement.of_shared_micro_batches())
    assert tried <= cost(placement, [[i] for i in range(16)])


def test_the_same_sizes_are_placed_the_same_way():
    assert placement_of(mixed(3)).of_own_micro_batches() == placement_of(mixed(3)).of_own_micro_batches()


def test_every_order_has_every_sequence():
    for order in placement_of(mixed(0)).other_orders():
        assert sorted(order) == list(range(16))


def test_thousands_of_sequences_are_placed_once():
    """Their rows are full anyway, and the server's loop has others to serve."""
    assert not list(placement_of(mixed(0) * 63).other_orders())
    assert len(list(placement_of(mixed(0)).other_orders())) == 30


def test_sequences_of_one_size_are_placed_once():
    assert not list(placement_of([256] * 16).other_orders())
