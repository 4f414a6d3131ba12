"""Layers that see equally far share page tables; a window bounds what a long sequence has at once."""

import pytest

from tx_async.engine.kv_cache import CacheLayout
from tx_async.engine.paging import TABLES_MAX, Paging


@pytest.mark.parametrize(
    ("layers", "windows", "page_layers"),
    [
        ({}, (0,), 1),
        ({0: 36}, (0,), 36),
        ({4096: 32}, (4096,), 32),
        ({128: 12, 0: 12}, (0, 128), 12),  # gpt-oss-20b
        ({1024: 29, 0: 5}, (0, *[1024] * 6), 5),  # Gemma 3 4B
        ({1024: 52, 0: 10}, (0, *[1024] * 6), 10),  # Gemma 3 27B
        ({4096: 24, 0: 8}, (0, *[4096] * 3), 8),  # OLMo 3 7B
        ({32: 7, 0: 21}, (0, 0, 0, 32), 7),
        ({512: 2, 64: 4, 0: 2}, (0, 512, 64, 64), 2),
    ],
)
def test_pages_hold_as_many_layers_of_every_group(layers, windows, page_layers):
    paging = Paging.of(layers)
    assert (paging.windows, paging.page_layers) == (windows, page_layers)
    for window, count in layers.items():
        tables = paging.tables_of(window)
        assert len(tables) * page_layers >= count
        assert {windows[table] for table in tables} == {window}


def test_there_are_few_tables_whatever_the_layers_are():
    for full in range(1, 60):
        assert Paging.of({0: full, 128: 60 - full}).num_tables <= TABLES_MAX


def test_a_long_sequence_fits_where_only_some_layers_see_all_of_it():
    paging = Paging.of({128: 12, 0: 12})
    assert paging.at_once(10_000, ahead=272) == [10_000, 400]
    assert paging.cache_for(4, 10_000, ahead=272) == 4 * 10_400 // 2
    assert paging.longest(cache_tokens=10_000, ahead=272, limit=131_072) == 20_000 - 400
    assert paging.longest(cache_tokens=150, ahead=272, limit=131_072) == 150
    assert Paging.of({0: 24}).longest(cache_tokens=10_000, ahead=272, limit=131_072) == 10_000
    assert Paging.of({128: 24}).longest(cache_tokens=400, ahead=272, limit=131_072) == 131_072


def test_a_cache_of_windows_holds_one_longest_sequence():
    layout = CacheLayout.plan(10, 16, 1000, paging=Paging((0, 32, 32), 4), ahead=64)
    assert layout.num_pages - 1 == 63 + 6 + 6
    assert layout.cache_tokens == 75 * 16 // 3
