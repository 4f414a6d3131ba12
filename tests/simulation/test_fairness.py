"""A heavy key beside a light one: what the light one gets is its part of the device, whatever the heavy one opens and
however much it sends."""

from collections.abc import Callable

import msgspec
import pytest

from tests.support.simulation import INFO
from tests.support.stage import Stage
from tx_async.config import ServerConfig
from tx_async.errors import Overloaded
from tx_async.scheduler.quota import Quota
from tx_async.wire.worker import SampleQuantum, TrainMicroBatch

SESSIONS = 20
SLOWER_MAX = 2 * 1.1
"""Two keys: a fair share is half, and ten per cent more is what turns of different lengths may cost."""


def stage() -> Stage:
    info = msgspec.structs.replace(INFO, num_training_slots=32, num_sequences_max=32, row_shapes=((1, 4), (1, 8)))
    return Stage(info=info)


def device_time(world: Stage) -> int:
    """Quanta that the device has done: what waiting is measured in, where one quantum takes what another takes."""
    return sum(isinstance(command, TrainMicroBatch | SampleQuantum) for command in world.executed)


def time_until(world: Stage, requests: list[str]) -> int:
    began = device_time(world)
    while any(world.result(request) is None for request in requests):
        assert world.step()
    return device_time(world) - began


def train_light(world: Stage) -> list[str]:
    world.owner = "light"
    model = world.model(world.new_session("light"))
    return [world.forward_backward(model, seq_id) for seq_id in range(1, 11)]


def train_heavy(world: Stage, num_runs: int = 1) -> None:
    """Twenty sessions, each with far more than the light key has."""
    world.owner = "heavy"
    for i in range(SESSIONS):
        session = world.new_session(f"heavy-{i}")
        for model in [world.model(session) for _ in range(num_runs)]:
            for seq_id in range(1, 16):
                world.forward_backward(model, seq_id, sizes=(6, 6))


def sample_light(world: Stage) -> list[str]:
    world.owner = "light"
    sampler = world.sampler(world.new_session("light"))
    return [world.ask(sampler, num_samples=4, max_tokens=6) for _ in range(40)]


def sample_heavy(world: Stage) -> None:
    world.owner = "heavy"
    for i in range(SESSIONS):
        sampler = world.sampler(world.new_session(f"heavy-{i}"))
        for _ in range(20):
            world.ask(sampler, num_samples=4, max_tokens=6)


@pytest.mark.parametrize(
    ("light", "heavy"),
    [(train_light, train_heavy), (train_light, lambda w: train_heavy(w, 3)), (sample_light, sample_heavy)],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_heavy_key_takes_half_of_a_light_one_s_rate_and_no_more(
    light: Callable[[Stage], list[str]], heavy: Callable[[Stage], None], is_first: bool
):
    alone, beside = stage(), stage()
    time_alone = time_until(alone, light(alone))
    if is_first:  # the heavy key is well under way when the light one comes
        heavy(beside)
        for _ in range(40):
            beside.step()
    requests = light(beside)
    if not is_first:
        heavy(beside)
    assert time_until(beside, requests) <= SLOWER_MAX * time_alone + 2, "two quanta may be on their way already"


def test_a_heavy_key_cannot_fill_the_queue_so_that_others_are_refused():
    world = stage()
    world.quota = world.submissions.quota = Quota(ServerConfig(queued_requests_max=100))
    with pytest.raises(Overloaded, match="queued_requests_max"):
        train_heavy(world)
    world.owner = "light"
    model = world.model(world.new_session("light"))
    requests = [world.forward_backward(model, seq_id) for seq_id in range(1, 21)]
    world.run()
    assert not any(world.error(request) for request in requests)
