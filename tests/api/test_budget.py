"""Bytes of request bodies: who gets them, who waits, and that nothing is lost on the way."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tx_async.api.budget import INLINE_BYTES_MAX, READING_SHARE, Bodies, Ledger
from tx_async.config import ServerConfig
from tx_async.errors import BodyTooLarge, Overloaded


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_key_waits_for_its_own_bytes_and_others_do_not():
    ledger = Ledger(1000, 400)
    await ledger.take("heavy", 300, False, 1)
    waiting = asyncio.create_task(ledger.take("heavy", 100, False, 60))
    await settle()
    assert not waiting.done()
    await ledger.take("light", 300, False, 1)
    ledger.give_back("heavy", 300)
    await waiting
    assert ledger.num_bytes == 400 and ledger.held == {"heavy": 100, "light": 300}


async def test_a_key_that_has_some_leaves_as_much_as_it_takes():
    ledger = Ledger(1000, 1000)
    await ledger.take("first", 370, False, 1)
    with pytest.raises(Overloaded, match="tenant_bodies_bytes_max"):
        await ledger.take("first", 300, False, 0.001)
    await ledger.take("second", 300, False, 1)


async def test_what_bodies_unfold_to_never_waits_for_bodies_that_wait_for_it():
    """All that may be read has been read, and every one of those bodies wants to be unpacked."""
    ledger = Ledger(1000, 400)
    for _ in range(3):
        await ledger.take("a", 100, False, 1)
    unpacking = [asyncio.create_task(ledger.take("a", 100, True, 60)) for _ in range(3)]
    for task in unpacking:
        await task
        ledger.give_back("a", 200)
    assert not ledger.num_bytes and not ledger.held


async def test_who_gives_up_gets_nothing_and_loses_nothing():
    ledger = Ledger(1000, 400)
    await ledger.take("a", 300, False, 1)
    gone, next_one = (asyncio.create_task(ledger.take("a", 200, False, 60)) for _ in range(2))
    await settle()
    ledger.give_back("a", 300)
    gone.cancel()  # in the moment that it was given its bytes
    await asyncio.wait([gone])
    await next_one
    ledger.give_back("a", 200)
    assert not ledger.num_bytes and not ledger.held and "0 waiting" in repr(ledger)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 300), st.booleans()), max_size=30))
def test_the_bounds_hold_whatever_comes_and_everybody_ends(wishes: list[tuple[str, int, bool]]):
    async def story() -> None:
        ledger = Ledger(1000, 400)

        async def one(owner: str, num_bytes: int, unfolds: bool) -> None:
            await ledger.take(owner, num_bytes, unfolds, 60)
            assert ledger.num_bytes <= 1000 and ledger.held[owner] <= 400
            await asyncio.sleep(0)
            ledger.give_back(owner, num_bytes)

        await asyncio.gather(*(one(*wish) for wish in wishes))
        assert not ledger.num_bytes and not ledger.held and "0 waiting" in repr(ledger)

    asyncio.run(story())


async def test_a_body_that_can_never_fit_is_refused_by_name():
    bodies = Bodies(ServerConfig(bodies_bytes_max=2**22, tenant_bodies_bytes_max=2**19))
    async with bodies.hold("a") as hold:
        with pytest.raises(BodyTooLarge, match="tenant_bodies_bytes_max"):
            await hold.take(2**19)
        await hold.take(bodies.body_bytes_max)
    assert bodies.body_bytes_max == 2**19 - 2**19 // READING_SHARE
    assert not bodies.large.num_bytes


async def test_a_small_body_does_not_wait_for_large_ones():
    bodies = Bodies(ServerConfig(bodies_bytes_max=2**22, tenant_bodies_bytes_max=2**21))
    async with bodies.hold("a") as large, bodies.hold("a") as small:
        await large.take(bodies.body_bytes_max - 2 * INLINE_BYTES_MAX)
        await small.take(INLINE_BYTES_MAX)
        await small.take(1000)  # it turns out to be larger, and counts as such
        assert not bodies.small.num_bytes
    assert not bodies.small.num_bytes and not bodies.large.num_bytes


async def test_a_key_decodes_one_body_at_a_time():
    bodies = Bodies(ServerConfig())
    running: list[str] = []

    async def decode(owner: str) -> None:
        async with bodies.decoding(owner):
            running.append(owner)
            assert running.count(owner) == 1 and len(running) <= 2
            await asyncio.sleep(0.001)
            running.remove(owner)

    await asyncio.gather(*(decode(owner) for owner in "aaaabbbbc"))
    assert not bodies._turns and not bodies._users
