"""Samples of many sessions on one device: in turns, from the right weights, each ending once."""

import msgspec
import pytest

from tests.support.reference import Reference
from tests.support.simulation import INFO
from tests.support.stage import Stage
from tx_async.scheduler.core.facts import RequestCancelled, SessionEnded
from tx_async.wire.facts import WorkerLost, WorkerReady
from tx_async.wire.worker import AdmitSequences, CancelSequences, LoadSampler, SampleQuantum, TrainMicroBatch


def test_one_short_sample_among_500_rollouts_of_somebody_else():
    """A tenant has queued 500 rollouts of 40 tokens on a device that holds 16 sequences. A second tenant's single short
    sample is answered within a few quanta, not after them."""
    stage = Stage(info=msgspec.structs.replace(INFO, num_sequences_max=16))
    first, second = stage.sampler(stage.new_session("a")), stage.sampler(stage.new_session("b"))
    rollouts = [stage.ask(first, num_samples=10, max_tokens=12) for _ in range(50)]
    for _ in range(10):
        stage.step()
    short = stage.ask(second, max_tokens=2)
    before = len(stage.executed)
    while stage.result(short) is None:
        assert stage.step()
    quanta = sum(isinstance(command, SampleQuantum) for command in stage.executed[before:])
    assert quanta <= 4
    assert sum(stage.result(request) is not None for request in rollouts) < 5
    stage.run()
    Reference(stage).check()


def test_sessions_that_both_want_the_whole_device_share_it():
    stage = Stage(info=msgspec.structs.replace(INFO, num_sequences_max=8))
    samplers = [stage.sampler(stage.new_session(name)) for name in "ab"]
    requests = {s: [stage.ask(s, num_samples=4, max_tokens=6) for _ in range(10)] for s in samplers}
    for _ in range(60):
        stage.step()
    done = [sum(stage.result(r) is not None for r in requests[s]) for s in samplers]
    assert min(done) > 0 and abs(done[0] - done[1]) <= 2


def test_training_and_sampling_share_the_device_by_weight(stage: Stage):
    """Both always have work; quanta that take equally long come in equal numbers."""
    model, sampler = stage.model(), stage.sampler(stage.new_session("b"))
    for seq_id in range(1, 60):
        stage.forward_backward(model, seq_id, sizes=(8,))
    for _ in range(60):
        stage.ask(sampler, num_samples=4, max_tokens=10)
    while len(stage.executed) < 60:
        assert stage.step()
    trained = sum(isinstance(command, TrainMicroBatch) for command in stage.executed)
    sampled = sum(isinstance(command, SampleQuantum) for command in stage.executed)
    assert trained > 10 and sampled > 10 and 0.5 < trained / sampled < 2


def test_where_both_run_side_by_side_sampling_has_one_quantum_ahead_so_that_a_newcomer_is_in_the_next():
    stage = Stage(info=msgspec.structs.replace(INFO, overlaps=True))
    model, sampler = stage.model(), stage.sampler(stage.new_session("b"))
    for seq_id in range(1, 40):
        stage.forward_backward(model, seq_id, sizes=(8,))
    for _ in range(10):
        stage.ask(sampler, num_samples=4, max_tokens=10)
    while len(stage.executed) < 40:
        assert stage.step()
        quanta = stage.state.workers["w0"].quanta
        assert quanta["sample"] <= 1 and 1 <= sum(quanta.values()) <= 3
    assert sum(isinstance(command, SampleQuantum) for command in stage.executed) > 5
    assert sum(isinstance(command, TrainMicroBatch) for command in stage.executed) > 5


def test_sampling_alone_gets_the_whole_device_and_training_is_level_when_it_comes_back(stage: Stage):
    sampler, model = stage.sampler(), stage.model()
    for _ in range(10):
        stage.ask(sampler, num_samples=4, max_tokens=8)
    for _ in range(40):
        stage.step()
    stage.executed.clear()
    for seq_id in range(1, 30):
        stage.forward_backward(model, seq_id, sizes=(8,))
    for _ in range(10):
        stage.ask(sampler, num_samples=4, max_tokens=8)
    while len(stage.executed) < 30:
        assert stage.step()
    assert sum(isinstance(command, SampleQuantum) for command in stage.executed) > 5


def test_a_cancelled_sample_leaves_the_device_at_once(stage: Stage):
    sampler = stage.sampler()
    sample = stage.ask(sampler, num_samples=3, max_tokens=15)
    for _ in range(3):
        stage.step()
    stage.handle(RequestCancelled(sample))
    stage.settle()
    assert "cancelled" in stage.error(sample)
    stage.run()
    assert any(isinstance(command, CancelSequences) for command in stage.executed)
    assert not stage.state.workers["w0"].sequences


def test_training_is_never_cancelled(stage: Stage):
    model = stage.model()
    request = stage.forward_backward(model, 1)
    stage.handle(RequestCancelled(request))
    stage.run()
    assert not stage.error(request)


def test_the_end_of_a_session_cancels_its_samples_and_no_others(stage: Stage):
    mine, other = stage.sampler(stage.new_session("a")), stage.sampler(stage.new_session("b"))
    cancelled, kept = stage.ask(mine, max_tokens=9), stage.ask(other, max_tokens=9)
    stage.handle(SessionEnded("a", "expired"))
    stage.run()
    assert "cancelled" in stage.error(cancelled) and not stage.error(kept)


def test_samples_of_a_lost_worker_run_again_with_the_same_outcome(stage: Stage):
    """A worker vanishes mid-decode. Sampling changes no weights, so the samples run again from their seeds and their
    caller never knows."""
    sampler = stage.sampler()
    sample = stage.ask(sampler, num_samples=3, max_tokens=8)
    for _ in range(4):
        stage.step()
    stage.crash_worker()
    stage.start_worker()
    stage.run()
    assert not stage.error(sample)
    Reference(stage).check()


def test_a_server_restart_draws_the_same_samples(stage: Stage):
    sampler = stage.sampler()
    sample = stage.ask(sampler, num_samples=3, max_tokens=8)
    stage.step()
    stage.crash_server()
    stage.start_worker()
    stage.run()
    Reference(stage).check()
    assert not stage.error(sample)


def test_more_adapter_versions_than_slots_take_turns(stage: Stage):
    """Six versions with many samples each, on two sampler slots: a version that is always busy must make room."""
    model = stage.model()
    paths = []
    for i in range(6):
        stage.train(model, 1, first_seq_id=3 * i + 1)
        stage.save(model, 3 * i + 3, f"v{i}")
        paths.append(f"tinker://{model}/weights/v{i}")
    stage.run()
    samplers = [stage.sampler(stage.new_session(f"t{i}"), path) for i, path in enumerate(paths)]
    first = {s: [stage.ask(s, num_samples=2, max_tokens=6) for _ in range(8)] for s in samplers}
    stage.executed.clear()
    done: dict[str, int] = {}
    while len(done) < 6:
        assert stage.step()
        for s in samplers:
            if s not in done and stage.result(first[s][0]) is not None:
                done[s] = len(stage.executed)
    finished = [sum(stage.result(request) is not None for request in first[s]) for s in samplers]
    assert max(finished) < 8, "nobody had to wait until others were through with everything"
    stage.run()
    assert sum(isinstance(command, LoadSampler) for command in stage.executed) < 60
    Reference(stage).check()


def test_nothing_is_sampled_from_a_slot_before_its_adapter_is_there(stage: Stage):
    """The files cannot be read: no sequence was prefilled with what was in the slot before (which would also have gone
    into the prefix cache under the wrong name)."""
    model = stage.model()
    stage.save(model, 1, "a")
    stage.run()
    path = f"tinker://{model}/weights/a"
    sampler = stage.sampler(path=path)
    stage.worker.engine.kept.clear()  # type: ignore[union-attr]
    stage.storage.is_down = True
    stage.executed.clear()
    stage.ask(sampler)
    stage.run()
    assert not any(isinstance(command, AdmitSequences) for command in stage.executed)


@pytest.fixture
def outage(stage: Stage) -> str:
    """A sampling session whose weights storage does not deliver."""
    model = stage.model()
    stage.save(model, 1, "a")
    stage.run()
    sampler = stage.sampler(path=f"tinker://{model}/weights/a")
    stage.worker.engine.kept.clear()  # type: ignore[union-attr]
    stage.storage.is_down = True
    stage.executed.clear()
    return sampler


def num_loads(stage: Stage) -> int:
    return sum(isinstance(command, LoadSampler) for command in stage.executed)


def test_samples_wait_out_an_outage_of_storage_and_others_go_on(stage: Stage, outage: str):
    """Storage is asked again after ever longer pauses; samples of other weights are not held up."""
    waiting = stage.ask(outage)
    for _ in range(240):
        stage.wait(1)
        stage.run()
    other = stage.ask(stage.sampler())
    stage.run()
    assert not stage.error(other) and stage.result(waiting) is None
    assert 8 <= num_loads(stage) <= 20
    stage.storage.is_down = False
    stage.wait(30)
    stage.run()
    assert not stage.error(waiting) and not stage.state.workers["w0"].sampler_outages
    Reference(stage).check()


def test_an_outage_that_does_not_end_fails_the_samples_and_says_why(stage: Stage, outage: str):
    waiting = stage.ask(outage)
    for _ in range(25):
        stage.run()
        assert stage.result(waiting) is None
        stage.wait(24)
    stage.wait(30)
    stage.run()
    assert "could not be read" in stage.error(waiting)


def test_samples_of_files_that_are_damaged_fail_at_once(stage: Stage, outage: str):
    stage.storage.is_down = False
    stage.storage.damaged.update(stage.storage.files)
    sample = stage.ask(outage)
    stage.run()
    assert "damaged" in stage.error(sample)


def test_a_failed_quantum_is_tried_again_without_its_sequences_being_lost(stage: Stage):
    sampler = stage.sampler()
    samples = [stage.ask(sampler, num_samples=2, max_tokens=6) for _ in range(2)]
    stage.run_until_next(lambda sent: isinstance(sent.command, SampleQuantum))
    stage.fail_next("server", "out of pages")
    stage.run()
    assert not any(stage.error(sample) for sample in samples)
    Reference(stage).check()


def test_a_prompt_that_fills_the_context_after_a_restart_with_a_smaller_one_fails_alone(stage: Stage):
    import tests.support.simulation as simulation

    sampler = stage.sampler()
    sample = stage.ask(sampler)
    stage.state.base_model = msgspec.structs.replace(simulation.BASE, max_context_length=1)
    later = stage.ask(sampler)
    stage.run()
    assert not stage.error(sample) and "fills the model's context" in stage.error(later)


def test_a_second_worker_that_only_samples_takes_its_part(stage: Stage):
    sampler, model = stage.sampler(), stage.model()
    instructions = stage.state.handle(WorkerReady("sampler", INFO, frozenset({"sample"})), stage.now)
    assert instructions == []
    samples = [stage.ask(sampler, num_samples=4, max_tokens=6) for _ in range(2)]
    train = stage.forward_backward(model, 1)
    workers = stage.state.workers
    assert workers["sampler"].sequences and not workers["sampler"].training_slots.slots()
    stage.handle(WorkerLost("sampler", "gone"))
    stage.run()
    assert not any(stage.error(request) for request in (*samples, train))
    Reference(stage).check()


def test_tenants_share_no_prefix_of_the_cache(stage: Stage):
    """Of one base model: what is found in the cache would tell a tenant what another one has asked."""
    for owner, session in (("alice", "a"), ("mallory", "b"), ("mallory", "c")):
        stage.owner = owner
        stage.ask(stage.sampler(stage.new_session(session)))
    stage.run()
    admitted = [command for command in stage.executed if isinstance(command, AdmitSequences)]
    namespaces = [spec.adapter_version for command in admitted for spec in command.sequences]
    assert len(namespaces) == 3 and len(set(namespaces)) == 2
