"""Pages are owned, shared, idle or free, never two of these; equal keys mean equal contents."""

from itertools import takewhile

import numpy as np
import pytest

from tx_async.engine.prefix_cache import PageKeys, PrefixCache


def keys(version, tokens, page_size=4):
    return PageKeys(version, page_size).upto(tokens, len(tokens))


def match(cache, wanted):
    """Pages of the longest known prefix, each with one more reference."""
    pages = list(takewhile(lambda page: page is not None, map(cache.known, wanted)))
    cache.retain(pages)
    return pages


def test_keys_chain_over_version_and_all_tokens_before():
    a = keys("v", list(range(12)))
    assert len(a) == 3
    assert keys("v", list(range(8))) == a[:2]
    assert keys("w", list(range(12)))[0] != a[0]
    assert keys("v", [9, *range(1, 12)])[2] != a[2]
    assert keys("v", [*range(4), 9, *range(5, 12)])[0] == a[0]


def test_keys_grow_with_their_sequence():
    tokens, growing = list(range(100, 120)), PageKeys("v", 4)
    assert [growing.upto(tokens, n)[:] for n in (3, 4, 11, 20)] == [keys("v", tokens[:n]) for n in (3, 4, 11, 20)]


def test_the_tail_of_a_prompt_has_a_key_of_its_own():
    tokens = list(range(10))
    assert PageKeys("v", 4).tail(tokens, 8) is None
    assert PageKeys("v", 4).tail(tokens, 10) == PageKeys("v", 4).tail([*tokens, 5], 10)
    assert PageKeys("v", 4).tail(tokens, 10) != PageKeys("v", 4).tail(tokens, 9)


def test_a_released_prefix_is_found_again_until_its_room_is_needed():
    cache = PrefixCache(num_pages=6, page_size=4)
    prefix = keys("v", list(range(12)))
    pages = cache.allocate(3)
    for page, key in zip(pages, prefix, strict=True):
        cache.register(page, key)
    cache.release(pages)
    assert cache.num_available == 5
    assert match(cache, prefix) == pages
    cache.release(pages)
    assert len(cache.allocate(4)) == 4  # two were free; the prefix's last two pages go first
    assert match(cache, prefix) == pages[:1]


def test_the_first_page_of_a_content_stays_the_known_one():
    cache = PrefixCache(num_pages=6, page_size=4)
    first, second = cache.allocate(2)
    (key,) = keys("v", [1, 2, 3, 4])
    cache.register(first, key)
    cache.register(second, key)
    cache.release([second])
    assert match(cache, [key]) == [first]
    cache.check([[first], [first]])


def test_too_much_is_refused_and_changes_nothing():
    cache = PrefixCache(num_pages=4, page_size=4)
    assert cache.allocate(4) is None
    assert len(cache.allocate(3)) == 3
    assert cache.allocate(1) is None


def test_a_disabled_cache_finds_nothing():
    cache = PrefixCache(num_pages=6, page_size=4, enabled=False)
    (page,) = cache.allocate(1)
    cache.register(page, b"key")
    assert match(cache, [b"key"]) == []


def test_releasing_too_often_is_noticed():
    cache = PrefixCache(num_pages=4, page_size=4)
    pages = cache.allocate(1)
    cache.release(pages)
    with pytest.raises(AssertionError, match="too often"):
        cache.release(pages)


def test_random_use_keeps_the_books():
    """Owners come, share prefixes and go; after each step the books agree, and a match is the content asked for."""
    rng = np.random.default_rng(0)
    cache, owners, content = PrefixCache(num_pages=20, page_size=2), [], {}
    for _ in range(3000):
        if owners and rng.random() < 0.5:
            cache.release(owners.pop(rng.integers(len(owners))))
        else:
            tokens = rng.integers(0, 2, 2 * rng.integers(1, 7)).tolist()
            wanted = keys("v", tokens, 2)
            pages = match(cache, wanted)
            assert all(content[page] == tokens[: 2 * i + 2] for i, page in enumerate(pages))
            fresh = cache.allocate(len(wanted) - len(pages))
            if fresh is None:
                cache.release(pages)
                continue
            owners.append(pages + fresh)
            for i, page in enumerate(owners[-1]):
                content[page] = tokens[: 2 * i + 2]
                cache.register(page, wanted[i])
        cache.check(owners)
