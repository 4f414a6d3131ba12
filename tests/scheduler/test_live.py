"""Live requests: told while they run, once and in order, whatever dies; nothing of them is journaled."""

from itertools import pairwise

import msgspec
import pytest

from tests.support.chain_engine import reference_sample
from tests.support.simulation import INFO
from tests.support.stage import Stage
from tx_async.scheduler.core.facts import RequestCancelled
from tx_async.wire.worker import CancelSequences, SampleQuantum, TrainMicroBatch


def test_a_piece_comes_with_every_quantum_and_together_they_are_the_sample(stage: Stage):
    watched = stage.watch(seed=3, num_samples=2)
    stage.run()
    assert watched.num_ended == 2 and len(watched.pieces) == 14, "two samples of 12 tokens: one, then two in a quantum"
    weights = stage.worker.engine.base_weights  # type: ignore[union-attr]
    for index in range(2):
        assert watched.tokens(index) == reference_sample(weights, b"\5\0\0\0", 3, index, 12)


def test_the_first_token_does_not_wait_for_a_whole_quantum_and_others_do_not_wait_for_many_first_ones(stage: Stage):
    for number in range(3):
        stage.watch(str(number), max_tokens=6)
        for _ in range(4):  # each comes while the one before it is sampled
            stage.step()
    stage.ask(stage.sampler(), max_tokens=6)
    stage.run()
    quanta = [command for command in stage.executed if isinstance(command, SampleQuantum)]
    assert {(quantum.decode_steps, quantum.only_first_tokens) for quantum in quanta} == {
        (1, True),
        (INFO.decode_steps, False),
    }
    first = [quantum.only_first_tokens for quantum in quanta]
    assert first[0] and (True, True) not in pairwise(first) and sum(first) >= 2


def test_nothing_of_it_reaches_the_journal_and_nothing_is_left_of_it(stage: Stage):
    before = msgspec.msgpack.encode(stage.disk.tables)
    stage.watch()
    stage.run()
    assert msgspec.msgpack.encode(stage.disk.tables) == before
    assert not stage.state.sampling.jobs and not stage.state.sampling.num_live


def test_after_the_worker_s_death_it_goes_on_without_saying_anything_twice(stage: Stage):
    alone = stage.watch("alone", seed=3)
    stage.run()
    watched = stage.watch("cut", seed=3)
    while len(watched.tokens()) < 4:
        assert stage.step()
    stage.crash_worker()
    stage.start_worker()
    stage.run()
    assert watched.tokens() == alone.tokens() and watched.num_ended == 1 and watched.error is None


def test_an_answer_that_comes_out_otherwise_the_second_time_ends_with_an_error(stage: Stage):
    watched = stage.watch(seed=3)
    while len(watched.tokens()) < 4:
        assert stage.step()
    job = stage.state.sampling.jobs["live-1"]
    job.told[0] = bytes(len(job.told[0]))  # type: ignore[attr-defined]
    stage.crash_worker()
    stage.start_worker()
    stage.run()
    assert watched.error is not None and "differently" in watched.error.message
    assert not stage.state.workers["w0"].sequences and not stage.state.sampling.jobs


def test_a_client_that_goes_away_frees_its_place_at_once(stage: Stage):
    watched = stage.watch(max_tokens=50)
    while not watched.pieces:
        assert stage.step()
    stage.handle(RequestCancelled("live-1"))
    quanta = sum(isinstance(command, SampleQuantum) for command in stage.executed)
    stage.run()
    assert any(isinstance(command, CancelSequences) for command in stage.executed)
    assert sum(isinstance(command, SampleQuantum) for command in stage.executed) <= quanta + 2
    assert not stage.state.workers["w0"].sequences


def test_it_has_a_place_beside_any_number_of_rollouts_of_its_own_key():
    """They come in many sessions, and would take every place that sessions and keys without work leave them."""
    stage = Stage(info=msgspec.structs.replace(INFO, num_sequences_max=32))
    for name in "abcdef":
        sampler = stage.sampler(stage.new_session(name))
        for _ in range(10):
            stage.ask(sampler, num_samples=4, max_tokens=40)
    for _ in range(6):
        stage.step()
    watched, before = stage.watch(max_tokens=2), len(stage.executed)
    while not watched.num_ended:
        assert stage.step()
    assert sum(isinstance(command, SampleQuantum) for command in stage.executed[before:]) <= 4


@pytest.mark.parametrize(("live_share", "least", "most"), [(1.0, 1.5, 3.0), (4.0, 3.5, 8.0)])
def test_its_weight_comes_on_top_of_that_of_other_samples(live_share, least, most):
    """Training, rollouts and a live answer: quanta that take equally long come by the sum of two weights to one."""
    policy = msgspec.structs.replace(Stage().state.policy, live_share=live_share)
    stage = Stage(policy=policy)
    model, sampler = stage.model(), stage.sampler(stage.new_session("b"))
    for seq_id in range(1, 100):
        stage.forward_backward(model, seq_id, sizes=(8,))
    for _ in range(60):
        stage.ask(sampler, num_samples=4, max_tokens=40)
    for number in range(40):
        stage.watch(f"live-{number}", max_tokens=40)
    while len(stage.executed) < 80:
        assert stage.step()
    trained = sum(isinstance(command, TrainMicroBatch) for command in stage.executed)
    sampled = sum(isinstance(command, SampleQuantum) for command in stage.executed)
    assert least < sampled / trained < most
