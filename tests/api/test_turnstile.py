"""However many large bodies come at once, a round of the event loop takes a few pieces of them."""

import asyncio

from tx_async.api.turnstile import Turnstile


async def test_a_round_of_the_loop_takes_so_many_pieces_and_uploads_take_turns():
    turnstile, passed = Turnstile(2), list[str]()

    async def upload(name: str) -> None:
        for _ in range(3):
            await turnstile.passed()
            passed.append(name)

    uploads = [asyncio.create_task(upload(name)) for name in "abcd"]
    per_round: list[int] = []
    while not all(task.done() for task in uploads):
        before = len(passed)
        await asyncio.sleep(0)
        per_round.append(len(passed) - before)
    assert max(per_round) == 2 and len(passed) == 12
    assert passed.index("d") < 6  # it came last, and does not wait for the others to end


async def test_who_gives_up_waiting_leaves_its_turn_to_the_next():
    turnstile = Turnstile(1)
    await turnstile.passed()
    impatient, patient = (asyncio.create_task(turnstile.passed()) for _ in range(2))
    await asyncio.sleep(0)
    impatient.cancel()
    async with asyncio.timeout(5):
        await patient
    for _ in range(3):  # nothing is left behind: it is free again
        await asyncio.sleep(0)
    assert repr(turnstile) == "<Turnstile [1 of 1 left | 0 waiting]>"
