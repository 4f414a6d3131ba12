"""The actor's side of live requests: what a client is told, and what is left when it goes, with the real journal."""

from contextlib import aclosing

import anyio
import numpy as np
import pytest

from tests.support.actor import InProcessServer, running
from tests.support.chain_engine import reference_sample
from tx_async.errors import InvalidRequest, NotReady, Overloaded, UnknownCheckpoint
from tx_async.scheduler.interface import LivePiece, Passage
from tx_async.wire.operations import Sample
from tx_async.wire.worker import CancelSequences


def operation(**fields) -> Sample:
    prompt = np.array([5], "<i4").tobytes()
    fields = {"prompt": prompt, "max_tokens": 12, "use_eos": False, "seed": 3} | fields
    return Sample(sampling_session_id="", seq_id=0, **fields)


async def told(server: InProcessServer, **fields) -> list[LivePiece]:
    async with aclosing(server.scheduler.sample_live("alice", operation(**fields))) as pieces:
        return [piece async for piece in pieces]


def tokens(pieces: list[LivePiece]) -> list[int]:
    return np.frombuffer(b"".join(piece.tokens for piece in pieces), "<i4").tolist()


def is_forgotten(server: InProcessServer) -> bool:
    scheduler = server.scheduler
    is_watched = len(scheduler.quota) or len(scheduler.performer.watch.passages)
    return not (is_watched or scheduler.state.sampling.jobs or scheduler.state.workers["w0"].sequences)


def passage_of(server: InProcessServer) -> Passage:
    (request_id,) = server.scheduler.state.sampling.jobs
    passage = server.scheduler.performer.watch.passages.get(request_id)
    assert passage is not None
    return passage


def times(server: InProcessServer, name: str) -> float | None:
    """How often a time of samples was measured."""
    registry = server.scheduler.performer.watch.metrics.registry
    return registry.get_sample_value(f"tx_async_{name}_seconds_count", {"kind": "sample"})


async def test_all_pieces_come_and_nothing_is_journaled():
    async with running() as server:
        pieces = await told(server)
        assert tokens(pieces) == reference_sample(server.engine.base_weights, b"\5\0\0\0", 3, 0, 12)
        assert [piece.stop_reason for piece in pieces] == [None] * 6 + ["length"]
        assert is_forgotten(server) and not any(server.disk.tables.values())
        assert times(server, "queue") == times(server, "run") == 1


async def test_closing_the_generator_ends_the_sequence():
    async with running() as server:
        async with aclosing(server.scheduler.sample_live("alice", operation(max_tokens=15))) as pieces:
            await anext(pieces)
            assert server.scheduler.state.workers["w0"].sequences
            passage = passage_of(server)
            assert passage.accepted_at <= passage.durable_at <= passage.begun_at <= passage.first_token_at
        assert passage.first_token_at <= passage.ended_at and not passage.failed and times(server, "run") == 1
        assert is_forgotten(server) and isinstance(server.commands[-1], CancelSequences)


async def test_a_cancelled_reader_ends_the_sequence():
    async with running() as server:
        server.is_worker_stuck = True
        with anyio.move_on_after(0.05):
            await told(server)
        assert is_forgotten(server)


async def test_it_goes_on_after_a_worker_s_death():
    async with running() as server:
        async with aclosing(server.scheduler.sample_live("alice", operation())) as pieces:
            first = [await anext(pieces), await anext(pieces)]
            server.lose_worker()
            rest = [piece async for piece in pieces]
        assert tokens([*first, *rest]) == reference_sample(server.engine.base_weights, b"\5\0\0\0", 3, 0, 12)


async def test_a_shutdown_says_try_again():
    async with running() as server:
        async with aclosing(server.scheduler.sample_live("alice", operation())) as pieces:
            await anext(pieces)
            passage = passage_of(server)
            server.is_worker_stuck = True
            await server.scheduler.stop(0.01)
            with pytest.raises(NotReady, match="Try again"):
                [piece async for piece in pieces]
        assert passage.failed and is_forgotten(server)
        with pytest.raises(NotReady):
            await told(server)


async def test_what_cannot_be_is_refused_before_the_first_piece():
    async with running(tenant_queued_samples_max=3) as server:
        with pytest.raises(UnknownCheckpoint):
            async with aclosing(server.scheduler.sample_live("alice", operation(), "tinker://s/weights/a")) as pieces:
                await anext(pieces)
        with pytest.raises(InvalidRequest, match="context"):
            await told(server, prompt=np.zeros(16, "<i4").tobytes())
        with pytest.raises(Overloaded):
            await told(server, num_samples=4)
        assert is_forgotten(server)


async def test_without_a_worker_it_is_refused():
    async with running(worker=False) as server:
        with pytest.raises(NotReady, match="worker"):
            await told(server)


async def test_while_a_worker_restarts_a_tenant_hears_nothing_of_its_log():
    async with running(worker=False) as server:
        server.worker_status = lambda in_full: ["worker w0.0 (last said: x)" if in_full else "worker w0.0: restarting"]
        with pytest.raises(NotReady) as refused:
            await told(server)
        assert refused.value.message == "The server is not ready: worker w0.0: restarting. Try again in a moment."
        assert "last said" not in str(server.scheduler._still_pending("r"))
        assert server.scheduler.waiting_for(in_full=True) == ["worker w0.0 (last said: x)"]
