"""P6: whatever a tenant does, nobody else's bits change. Run alone and beside hostile tenants, compare bits.

On the CPU rows of one micro-batch are one row each by default; with more rows to a micro-batch
(`train_micro_batch_size`) the same holds bit for bit, as long as the micro-batch has the same shape.
"""

import numpy as np
import pytest

from tx_async.errors import NonFiniteGradients
from tx_async.layers.lora import by_path
from tx_async.testing.engine_bench import assert_same_bits, rl_segment, segment
from tx_async.wire.worker import LOSS_FNS, AdamParams, StepOptimizer

DATA = [[segment(20, 1), segment(10, 2)], [rl_segment(25, 3, "ppo")], [rl_segment(30, 4, "gspo")]]


def victim(bench, slot, beside=None):
    """Three batches and steps; `beside(step)` gives rows of others in the same micro-batch."""
    bench.create(slot, rank=4, seed=11)
    outputs = []
    for step, data in enumerate(DATA):
        rows = [(slot, data), *(beside(step) if beside else [])]
        outputs.append([x[:1] for x in bench.train(*rows)])
        outputs.append(bench.step(slot, weight_decay=0.1).metrics)
    return outputs, bench.state(slot)


def hostile(bench):
    """Every other slot of the engine, with NaN and huge inputs, other ranks, losses and wild steps."""
    bench.create(1, rank=8, seed=5)
    bench.create(2, rank=1, seed=6, train_mlp=False)

    def rows(step):
        bad = segment(32, 50 + step, weights=[np.nan, np.inf, 1e30][step])
        noisy = rl_segment(17, 60 + step, LOSS_FNS[1 + step], advantages=1e6)
        if step == 1:
            bench.step(2, learning_rate=1e5, weight_decay=1e3)
            bench.create(1, rank=3, seed=7)
        return [(1, [bad]), (2, [noisy]), (-1, [])]

    return rows


@pytest.mark.parametrize("rows", [1, 4])
def test_hostile_neighbours_change_no_bit(make_bench, rows):
    alone, together = (make_bench(train_micro_batch_size=rows) for _ in range(2))
    assert_same_bits(victim(alone, 0), victim(together, 0, hostile(together)))


@pytest.mark.parametrize("rows", [1, 4])
def test_the_slot_and_the_place_in_the_micro_batch_change_no_bit(make_bench, rows):
    bench = make_bench(train_micro_batch_size=rows)
    in_slot_0, in_slot_3 = victim(bench, 0), victim(bench, 3)
    assert_same_bits(in_slot_0, in_slot_3)


def test_another_row_of_the_micro_batch_gives_the_same_bits(make_bench):
    bench = make_bench(train_micro_batch_size=4)
    for slot in (0, 1):
        bench.create(slot, rank=4, seed=3)
    rows = [(1, DATA[1]), (-1, []), (0, DATA[0]), (-1, [])]
    third = bench.train(*rows)
    bench.create(2, rank=4, seed=3)
    first = bench.train((2, DATA[0]))
    assert_same_bits([x[2] for x in third], [x[0] for x in first])
    assert_same_bits(bench.state(0), bench.state(2))


def test_nan_gradients_fail_their_own_step_and_leave_the_weights(bench):
    config = bench.create(0)
    bench.create(1)
    bench.train((0, DATA[0]))
    bench.step(0)
    before, neighbour = bench.state(0), bench.state(1)
    bench.train((0, [segment(5, 1, weights=np.nan)]))
    with pytest.raises(NonFiniteGradients):
        bench.step(0)
    assert_same_bits(before, bench.state(0))
    assert_same_bits(neighbour, bench.state(1))
    bench.train((0, DATA[1]))
    assert bench.step(0).step == 2
    assert config.rank == 4


def test_steps_behind_a_failed_one_go_on(bench):
    """The worker keeps commands in flight: the next ones are issued before anybody knows that a step failed."""
    bench.create(0)
    bench.train((0, [segment(5, 1, weights=np.nan)]))
    pendings = [bench.engine.execute(StepOptimizer(slot=0, adam=AdamParams()), []) for _ in range(2)]
    with pytest.raises(NonFiniteGradients):
        pendings[0]()
    assert pendings[1]()[0].step == 1


def test_a_reused_slot_inherits_nothing(bench):
    """Weights, moments, gradients, step count and scale of the one before are gone."""
    fresh = victim(bench, 0)
    bench.create(1, rank=8, seed=2)
    for step in range(3):
        bench.train((1, [segment(30, step)]))
        bench.step(1, learning_rate=0.1)
    bench.train((1, [segment(30, 9, weights=np.nan)]))
    assert_same_bits(fresh, victim(bench, 1))


def test_padding_of_lower_ranks_and_untrained_groups_stay_zero(bench):
    bench.create(0, rank=3, train_attn=False, train_unembed=False)
    for step in range(4):
        bench.train((0, [segment(30, step)]))
        bench.step(0, learning_rate=0.1, weight_decay=0.5, eps=0.0)
    state = bench.state(0)
    for tree in (state.weights, state.m, state.v):
        for name, (a, b) in tree["layers"].items():
            trained = name in ("gate", "up", "down")
            assert (a[..., 3:] == 0).all() and (b[:, 3:] == 0).all()
            assert (a != 0).any() == trained == (b != 0).any()
        assert all((x == 0).all() for x in tree["head"]["head"])


def test_the_servers_maximum_rank_changes_no_bit_of_a_low_rank(make_bench):
    """Low ranks have programs of their own, so a neighbour of a higher rank costs them nothing."""
    alone, beside = make_bench(max_lora_rank=8), make_bench(max_lora_rank=16)
    beside.create(1, rank=12)

    def neighbour(step):
        return [(1, [segment(30, 70 + step)])]

    outputs, state = victim(alone, 0)
    other_outputs, other_state = victim(beside, 0, neighbour)
    assert_same_bits([x for x in outputs if isinstance(x, list)], [x for x in other_outputs if isinstance(x, list)])
    for tree, wide in ((state.weights, other_state.weights), (state.m, other_state.m)):
        for name, (a, b) in tree["layers"].items():
            assert_same_bits((a, b), (wide["layers"][name][0][..., :8], wide["layers"][name][1][:, :8]))
            assert (wide["layers"][name][0][..., 8:] == 0).all()
    assert np.abs(beside.state(1).gradients["layers"]["q"][1]).max() > 0


@pytest.mark.parametrize("rows", [1, 4])
def test_wider_slots_change_no_bit_of_what_fits_the_first_ones(make_bench, rows):
    """Of a class below the first slots' rank, and of that rank."""
    rows_of = {"train_micro_batch_size": rows, "max_lora_rank": 64}
    narrow, wide = make_bench(**rows_of), make_bench(lora_rank=50, **rows_of)
    assert [bench.engine.info().max_lora_rank for bench in (narrow, wide)] == [32, 64]
    for bench in (narrow, wide):
        bench.create(0, rank=4, seed=3)
        bench.create(1, rank=20, seed=4)
    wide.create(2, rank=50)
    for slot, data in enumerate(DATA[:2]):
        assert_same_bits(*(bench.train((slot, data)) for bench in (narrow, wide)))
        assert_same_bits(*(bench.step(slot).metrics["grad_norm"] for bench in (narrow, wide)))
        of_wide = by_path(lambda _, ab: (ab[0][..., :32], ab[1][..., :32, :]), wide.state(slot).weights)
        assert_same_bits(narrow.state(slot).weights, of_wide)
