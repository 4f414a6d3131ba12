"""Burned numbers: a set that costs what its gaps cost."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tx_async.scheduler.training.ranges import Ranges

SMALL = st.integers(0, 40)


@given(st.lists(st.tuples(SMALL, SMALL), max_size=12), SMALL)
def test_it_is_the_set_of_the_same_numbers(additions: list[tuple[int, int]], floor: int):
    ranges, numbers = Ranges(), set()
    for start, stop in additions:
        ranges.add(start, stop)
        numbers.update(range(start, stop))
        pairs = ranges.pairs()
        assert all(left[1] < right[0] for left, right in pairwise(pairs)), "they never touch"
    for _ in range(2):
        for number in range(-1, 42):
            assert (number in ranges) == (number in numbers)
            assert ranges.end_of(number) == next(n for n in range(number, 99) if n not in numbers)
        ranges.drop_below(floor)
        numbers = {number for number in numbers if number >= floor}


def test_a_wide_gap_costs_what_a_narrow_one_costs():
    ranges = Ranges()
    ranges.add(1, 10**30)
    ranges.add(10**30 + 1, 10**31)
    assert len(ranges) == 2 and 10**29 in ranges and 10**30 not in ranges
