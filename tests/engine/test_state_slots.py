"""Slots of recurrent state have one owner, and snapshots go least recently used first."""

from tx_async.engine.state_slots import NULL_SLOT, StateSlots


def test_a_model_without_recurrent_layers_asks_for_nothing():
    states = StateSlots()
    assert (states.enabled, states.take()) == (False, NULL_SLOT)
    states.release(NULL_SLOT)
    states.check([NULL_SLOT] * 3)


def test_a_snapshot_is_found_once_its_quantum_is_over():
    states = StateSlots(2, 2)
    states.begin()
    slot = states.snapshot(b"a")
    assert states.find(b"a") is None, "its prefill has not run"
    assert states.find(b"a", after_prefill=True) == slot
    assert states.snapshot(b"a") == NULL_SLOT, "once is enough"
    states.begin()
    assert states.find(b"a") == slot
    assert states.find(b"b") is None


def test_the_least_recently_used_snapshot_makes_room_but_never_one_that_this_quantum_needs():
    states = StateSlots(1, 2)
    for key in (b"a", b"b"):
        states.begin()
        states.snapshot(key)
    states.begin()
    states.find(b"a")
    third = states.snapshot(b"c")
    assert third and states.find(b"b") is None
    assert states.snapshot(b"d") == NULL_SLOT, "a is read by this quantum, c written"
    states.begin()
    assert states.snapshot(b"d")
    states.check([states.take()])


def test_sequences_and_snapshots_never_share_a_slot():
    states = StateSlots(3, 3)
    states.begin()
    taken = [states.take() for _ in range(3)] + [states.snapshot(bytes([n])) for n in range(3)]
    assert sorted(taken) == [1, 2, 3, 4, 5, 6]
