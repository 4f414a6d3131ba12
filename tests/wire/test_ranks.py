"""Which class an adapter belongs to depends on its own rank alone."""

from tx_async.wire.ranks import class_of, rank_classes, shared_classes, slot_rank


def test_slots_begin_at_32_and_grow_by_classes_to_what_is_asked_for():
    assert [slot_rank(128, rank) for rank in (0, 1, 32, 33, 64, 65, 128)] == [32, 32, 32, 64, 64, 128, 128]
    assert [slot_rank(8), slot_rank(40), slot_rank(40, 33), slot_rank(16, 99)] == [8, 32, 40, 16]


def test_a_rank_has_the_same_class_in_slots_of_every_rank_that_hold_it():
    for most in (40, 128, 256):
        widths = [width for width in rank_classes(most) if width >= slot_rank(most)]
        for of_width in (rank_classes, shared_classes):
            for rank in range(1, most + 1):
                classes = {class_of(rank, of_width(width)) for width in widths if width >= rank}
                assert len(classes) == 1 and classes.pop() >= rank
