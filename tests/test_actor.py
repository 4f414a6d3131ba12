"""What an actor is: a name, an inbox, one task; started together, and ended together when one of them fails."""

import asyncio
import inspect
import re

import pytest

from tx_async import actor
from tx_async.actor import Inbox, running
from tx_async.dispatch.router import Router
from tx_async.identity import Identity
from tx_async.journal.journal import Journal
from tx_async.scheduler.outbox import Outbox
from tx_async.scheduler.performer import Performer
from tx_async.scheduler.scheduler import Scheduler
from tx_async.worker.supervisor import Supervisor

ACTORS = (Scheduler, Performer, Outbox, Journal, Router, Supervisor, Identity)


class Patient:
    name = "patient"
    was_cancelled = False

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.was_cancelled = True


class Broken:
    name = "broken"

    async def run(self) -> None:
        raise AssertionError("an invariant")


def test_the_page_on_actors_lists_them_as_they_call_themselves():
    named = re.findall(r"^\| `(\w+)` \|", actor.__doc__ or "", re.MULTILINE)
    assert named == [owner.name for owner in ACTORS]
    assert all(inspect.iscoroutinefunction(owner.run) for owner in ACTORS)


async def test_an_actor_that_fails_ends_the_others_and_the_context():
    patient = Patient()
    with pytest.RaisesGroup(pytest.RaisesExc(AssertionError, match="an invariant")):
        async with running(patient, Broken()):
            await asyncio.Event().wait()
    assert patient.was_cancelled


async def test_actors_end_with_their_context_and_carry_their_names_as_tasks():
    patient = Patient()
    async with running(patient):
        await asyncio.sleep(0)
        assert "patient" in {task.get_name() for task in asyncio.all_tasks()}
    assert patient.was_cancelled


async def test_a_closed_inbox_is_emptied_before_its_consumer_ends():
    inbox: Inbox[str] = Inbox()
    inbox.post("first")
    inbox.close()
    assert await inbox.wait()
    assert inbox.popleft() == "first"
    assert not await inbox.wait()


async def test_a_consumer_sleeps_until_something_is_posted():
    inbox: Inbox[str] = Inbox()
    waiting = asyncio.create_task(inbox.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    inbox.post("first")
    assert await waiting
