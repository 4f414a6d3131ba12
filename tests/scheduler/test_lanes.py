"""Operations of one run: accepted in any order, carried out in `seq_id` order, once."""

import msgspec
import pytest

from tests.support.reference import Reference
from tests.support.stage import Stage
from tx_async.errors import Conflict, InvalidRequest
from tx_async.scheduler import submissions
from tx_async.scheduler.core.facts import SubmissionRefused, Tick
from tx_async.wire.operations import OptimStep, Rejected, UnloadModel
from tx_async.wire.worker import AdamParams, StepOptimizer, TrainMicroBatch


def commands(stage: Stage) -> list[str]:
    kinds = (TrainMicroBatch, StepOptimizer)
    return [type(command).__name__ for command in stage.executed if isinstance(command, kinds)]


def test_a_batch_in_pieces_arrives_first_piece_last(stage: Stage):
    """The SDK cuts a large batch in pieces, sends 2..N at once, waits until they are accepted and only then sends 1.
    The promise for piece 2 must not wait for piece 1, and the step after them must not run before it."""
    model = stage.model()
    step = stage.optim_step(model, 4)
    pieces = [stage.forward_backward(model, seq_id) for seq_id in (2, 3)]
    stage.run()
    assert commands(stage) == [] and stage.result(pieces[0]) is None
    first = stage.forward_backward(model, 1)
    stage.run()
    assert commands(stage) == [*["TrainMicroBatch"] * 3, "StepOptimizer"]
    assert not any(stage.error(request) for request in (first, *pieces, step))
    Reference(stage).check()


def test_a_burned_seq_id_holds_up_the_rest_for_a_bounded_time(stage: Stage):
    """A submit was refused on the way (a proxy's 4xx): its number is never sent again."""
    model = stage.model()
    later = stage.forward_backward(model, 2)
    stage.wait(stage.policy.chunk_gap_s - 1)
    stage.run()
    assert stage.result(later) is None
    stage.wait(2)
    stage.run()
    assert not stage.error(later)
    with pytest.raises(Conflict, match="used up"):
        stage.forward_backward(model, 1)


def test_what_follows_a_gap_tells_how_long_it_is_waited_for(stage: Stage):
    """The SDK took a number and then refused the step itself. It goes on; the step that it sends next cannot be a piece
    of the batch after the gap, so nothing is missing that could still come."""
    assert stage.policy.seq_gap_s < stage.policy.chunk_gap_s
    model = stage.model()
    after = [stage.forward_backward(model, 2), stage.optim_step(model, 3)]
    stage.wait(stage.policy.seq_gap_s - 1)
    stage.run()
    assert stage.result(after[0]) is None
    stage.wait(1)
    stage.run()
    assert not any(stage.error(request) for request in after)
    Reference(stage).check()


@pytest.mark.parametrize("is_accepted", [True, False])
def test_a_batch_whose_pieces_take_long_to_arrive_is_not_cut(stage: Stage, is_accepted: bool):
    """Two hundred megabytes over a thin line, with the first piece last; or the first piece meets a full queue, and the
    SDK tries again now and then. The run waits as long as it hears of its client."""
    model = stage.model()
    pieces = [stage.forward_backward(model, 2)]
    for seq_id in range(3, 9):
        stage.wait(0.9 * stage.policy.chunk_gap_s)
        if is_accepted:
            pieces.append(stage.forward_backward(model, seq_id))
        else:
            stage.handle(SubmissionRefused(model))
    stage.wait(0.9 * stage.policy.chunk_gap_s)
    stage.run()
    pieces.append(stage.forward_backward(model, 1))
    stage.run()
    assert not any(stage.error(request) for request in pieces)
    Reference(stage).check()


def test_a_latecomer_stays_out_after_a_restart_too(stage: Stage):
    """The gap was given up and the operation after it has reported its result; then the server restarts."""
    model = stage.model()
    stage.forward_backward(model, 2)
    stage.wait(stage.policy.chunk_gap_s + 1)
    stage.run()
    stage.crash_server()
    stage.settle()
    with pytest.raises(Conflict):
        stage.forward_backward(model, 1)


def test_a_latecomer_whose_commit_was_on_its_way_when_the_gap_was_given_up_fails_alone(stage: Stage):
    model = stage.model()
    later = stage.forward_backward(model, 2)
    late = OptimStep(model_id=model, seq_id=1, adam_params=AdamParams())
    stage.operations[model, 1] = late
    stage.now += stage.policy.chunk_gap_s + 1
    stage.submit(late)
    stage.handle(Tick())
    stage.settle()
    stage.run()
    known = stage.catalog.find_request(model, 1)
    assert known is not None
    assert "came too late" in stage.error(known.request_id) and not stage.error(later)
    Reference(stage).check()


def test_a_retry_is_the_first_request(stage: Stage):
    model = stage.model()
    first = stage.optim_step(model, 1)
    assert stage.optim_step(model, 1) == first
    stage.run()
    assert stage.optim_step(model, 1) == first
    assert commands(stage) == ["StepOptimizer"]


def test_the_same_key_with_another_body_is_a_conflict(stage: Stage):
    model = stage.model()
    stage.forward_backward(model, 1, token=1)
    with pytest.raises(Conflict, match="another body"):
        stage.forward_backward(model, 1, token=2)


def test_a_retry_finds_its_request_after_a_restart(stage: Stage):
    model = stage.model()
    first = stage.forward_backward(model, 1)
    stage.crash_server()
    stage.start_worker()
    assert stage.forward_backward(model, 1) == first
    stage.run()
    assert not stage.error(first)


def test_two_records_of_one_key_after_a_commit_of_unknown_outcome(stage: Stage):
    """The disk reported an error although the record had got through. The client tried again; then the server restarted
    and found both."""
    model = stage.model()
    lost = stage.optim_step(model, 1)
    operation = stage.operations[model, 1]
    del stage.catalog.request_ids[model, 1]
    del stage.lane(model).steps[1]
    stage.lane(model).cursor = 1
    second = stage.submit_now(operation)
    assert second != lost
    stage.crash_server()
    stage.start_worker()
    stage.run()
    assert not stage.error(second)
    assert lost not in stage.disk.tables["request"]


def test_operations_after_unload_fail_and_say_why(stage: Stage):
    model = stage.model()
    waiting = stage.forward_backward(model, 2)
    unload = stage.submit_now(UnloadModel(model_id=model))
    after = stage.forward_backward(model, 3)
    assert "unloaded" in stage.error(waiting) and "unloaded" in stage.error(after)
    assert not stage.error(unload)
    assert stage.submit_now(UnloadModel(model_id=model)) == unload
    stage.crash_server()
    assert model not in stage.state.training.runs.lanes


def test_unload_that_was_accepted_before_a_crash_still_unloads(stage: Stage):
    model = stage.model()
    stage.submit(UnloadModel(model_id=model))
    key = submissions.key_of(UnloadModel(model_id=model))
    changes, _ = stage.commits.popleft()
    stage._write(changes)
    stage.crash_server()
    stage.settle()
    request = stage.catalog.find_request(*key)
    assert request is not None and not stage.error(request.request_id)
    assert stage.catalog.models[model].status == "unloaded"


def test_a_seq_id_far_ahead_is_refused_and_burns_nothing(stage: Stage):
    model = stage.model()
    far = stage.policy.seq_ahead_max + 1
    with pytest.raises(InvalidRequest, match="seq_ahead_max"):
        stage.optim_step(model, far)
    stage.wait(stage.policy.chunk_gap_s + 1)
    requests = stage.train(model, 1)
    stage.run()
    assert not any(stage.error(request) for request in requests)
    stage.optim_step(model, far)  # no longer far: the run has accepted 1 and 2
    assert stage.lane(model).newest_seq_id == far


def test_a_journal_that_holds_a_seq_id_far_ahead_starts(stage: Stage):
    """An earlier server accepted it. Its predecessors will never come, however many they would be."""
    model = stage.model()
    stage.train(model, 1)
    stage.run()
    stage.state.policy = msgspec.structs.replace(stage.policy, seq_ahead_max=10**12)
    far = stage.optim_step(model, 10**9)
    stage.crash_server()
    stage.start_worker()
    stage.settle()
    stage.wait(stage.policy.chunk_gap_s + 1)
    stage.run()
    assert not stage.error(far)
    stage.crash_worker()
    stage.start_worker()
    next_one = stage.optim_step(model, 10**9 + 1)
    stage.run()
    assert not stage.error(next_one) and len(stage.lane(model).burned) == 1
    Reference(stage).check()


def test_what_was_forgotten_does_not_make_the_next_seq_id_look_far(stage: Stage):
    """A run that only evaluates takes no snapshots, and its results are forgotten one by one."""
    model = stage.model()
    far = stage.policy.seq_ahead_max - 1
    stage.forward_backward(model, far, forward_only=True)
    stage.wait(stage.policy.chunk_gap_s + 1)
    stage.run()
    stage.wait(stage.policy.result_retention_s + 1)
    assert not stage.lane(model).steps, "they would fill the memory of a run that never takes a step"
    stage.crash_server()
    stage.start_worker()
    stage.settle()
    following = stage.forward_backward(model, far + 1)
    stage.run()
    assert not stage.error(following), "and it need not wait for what was forgotten"


@pytest.mark.parametrize("seq_id", [3, 9_000])
def test_a_refused_request_has_its_answer_whatever_comes_before_it(stage: Stage, seq_id: int):
    """A legacy client's body is malformed, its seq_id absurd: nobody waits for the numbers before it, and they are not
    burned."""
    model = stage.model()
    refused = stage.submit_now(Rejected(model_id=model, seq_id=seq_id, kind="OptimStep", message="malformed"))
    stage.run()
    assert stage.error(refused) == "malformed"
    stage.wait(3 * stage.policy.chunk_gap_s)
    first = stage.forward_backward(model, 1)
    stage.run()
    assert not stage.error(first)
    stage.crash_server()
    stage.start_worker()
    second = stage.optim_step(model, 2)
    stage.run()
    assert not stage.error(second)
    Reference(stage).check()
