"""Rows of several runs share a micro-batch; each run's numbers are what they would be alone."""

import msgspec
import pytest

from tests.support.chain_engine import NAN_LOSS_TOKEN
from tests.support.reference import Reference
from tests.support.simulated_clients import datum
from tests.support.simulated_worker import Sent
from tests.support.simulation import INFO
from tests.support.stage import POISON_TOKEN, Stage
from tx_async.wire.operations import ForwardBackward
from tx_async.wire.worker import TrainMicroBatch


@pytest.fixture
def stage() -> Stage:
    return Stage(info=msgspec.structs.replace(INFO, num_training_slots=4))


def micro_batches(stage: Stage) -> list[TrainMicroBatch]:
    return [command for command in stage.executed if isinstance(command, TrainMicroBatch)]


def busy(stage: Stage) -> str:
    """Something that keeps the device occupied while the requests of a test are accepted."""
    model = stage.model()
    stage.forward_backward(model, 1, sizes=(16, 16, 16, 16))
    return model


def test_rows_of_two_tenants_share_a_micro_batch_and_nobody_s_order_changes(stage: Stage):
    stage.new_session("t")
    first, second = stage.model("s"), stage.model("t")
    stage.forward_backward(first, 1)
    stage.forward_backward(second, 1)
    stage.run()
    busy(stage)
    for seq_id in (2, 3, 4):
        stage.forward_backward(first, seq_id, sizes=(3, 3, 8), token=seq_id)
        stage.forward_backward(second, seq_id, sizes=(8, 8, 8), token=seq_id)
    stage.run()
    assert any(len({slot for slot in command.slots if slot >= 0}) > 1 for command in micro_batches(stage))
    Reference(stage).check()


def test_forward_passes_do_not_share_with_forward_backward(stage: Stage):
    first, second = stage.model(), stage.model()
    stage.forward_backward(first, 1)
    stage.forward_backward(second, 1)
    stage.run()
    busy(stage)
    stage.forward_backward(first, 2, forward_only=True)
    stage.forward_backward(second, 2)
    stage.run()
    assert sum(command.forward_only for command in micro_batches(stage)) == 1
    Reference(stage).check()


def test_a_micro_batch_fails_and_only_the_culprit_does(stage: Stage):
    """Which of its rows was it? Each runs again alone, and the one that fails again is the one."""
    first, second = stage.model(), stage.model()
    for model in (first, second):
        stage.forward_backward(model, 1)
    stage.run()
    busy(stage)
    culprit, neighbour = stage.forward_backward(first, 2, token=2), stage.forward_backward(second, 2, token=3)
    stage.run_until_next(is_shared)
    stage.fail_next("user", "it did not work out")
    stage.run_until_next(lambda sent: is_of(sent, stage.models.index(first), 2))
    alone = stage.fail_next("user", "it did not work out")
    assert isinstance(alone, TrainMicroBatch)
    assert sum(slot >= 0 for slot in alone.slots) == 1
    stage.run()
    assert stage.error(culprit) == "it did not work out" and not stage.error(neighbour)
    Reference(stage).check()


def is_shared(sent: Sent) -> bool:
    return isinstance(sent.command, TrainMicroBatch) and sum(slot >= 0 for slot in sent.command.slots) > 1


def is_of(sent: Sent, run: int, token: int) -> bool:
    """Whether the first row of a micro-batch is a datum of this run that begins with this token."""
    return isinstance(sent.command, TrainMicroBatch) and list(sent.tensors[0][0][:2]) == [token, run]


def test_a_request_that_kills_its_worker_fails_alone(stage: Stage):
    """Each time it runs, the worker dies. Its neighbours die along twice; then it runs alone, until it is given up."""
    poisoned, innocent = stage.model(), stage.model()
    for model in (poisoned, innocent):
        stage.forward_backward(model, 1)
    stage.run()
    busy(stage)
    bad = stage.forward_backward(poisoned, 2, token=POISON_TOKEN)
    good = [stage.forward_backward(innocent, seq_id) for seq_id in (2, 3, 4)]
    sampler = stage.sampler()
    sample = stage.ask(sampler, num_samples=3)
    for _ in range(60):
        stage.run()
    assert "worker died" in stage.error(bad)
    assert not any(stage.error(request) for request in [*good, sample])
    later = stage.optim_step(poisoned, 3)
    stage.run()
    assert not stage.error(later)
    assert stage.num_crashes <= stage.policy.attempts_max


def test_a_transient_failure_of_the_engine_is_tried_again(stage: Stage):
    model = stage.model()
    request = stage.forward_backward(model, 1)
    stage.execute_next()
    stage.fail_next("server", "out of memory")
    stage.run()
    assert not stage.error(request)
    Reference(stage).check()


def test_a_loss_that_is_not_finite_fails_its_own_request_and_leaves_no_gradients(stage: Stage):
    """The batch in pieces has a datum whose loss is NaN: that piece fails and says which datum it was. The piece before
    it and the neighbour's keep their gradients, and the step takes exactly those."""
    model, neighbour = stage.model(), stage.model()
    kept = stage.forward_backward(model, 1, token=2)
    number = stage.models.index(model)
    bad_data = (datum([3, number, 0]), datum([4, number, 0]), datum([NAN_LOSS_TOKEN, number, 0]))
    bad = stage.submit_now(ForwardBackward(model_id=model, seq_id=2, data=bad_data, loss_fn="cross_entropy"))
    others = [stage.forward_backward(neighbour, 1), stage.optim_step(neighbour, 2)]
    step = stage.optim_step(model, 3)
    stage.run()
    assert stage.error(bad).startswith("datum 2: its loss is nan.")
    assert not any(stage.error(request) for request in (kept, step, *others))
    Reference(stage).check()
    stage.crash_server()
    stage.start_worker()
    stage.forward_backward(model, 4)
    stage.run()
    Reference(stage).check()


def test_a_forward_pass_reports_a_loss_that_is_not_finite(stage: Stage):
    model = stage.model()
    request = stage.forward_backward(model, 1, token=NAN_LOSS_TOKEN, forward_only=True)
    stage.run()
    assert not stage.error(request)
