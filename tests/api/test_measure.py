"""What a body would take, found before anything of it is decoded."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.api.test_integers import message
from tx_async.api import measure
from tx_async.api.measure import NestedTooDeep, check_forward_backward, check_nesting, check_values
from tx_async.errors import BodyTooLarge, InvalidRequest


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


TEXTS = st.text(st.sampled_from('[]{}"\\a,:'), max_size=8)
VALUES = st.recursive(
    st.one_of(TEXTS, st.integers()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
)


@given(VALUES)
def test_nesting_is_what_a_parser_would_find(value: object):
    depth, body = depth_of(value), json.dumps(value).encode()
    check_nesting(body, depth)
    if depth:
        with pytest.raises(NestedTooDeep, match=f"{depth} levels.*json_depth_max"):
            check_nesting(body, depth - 1)


@given(VALUES, st.integers(1, 9))
def test_it_makes_no_difference_where_a_piece_ends(value: object, piece_bytes: int):
    depth, body = depth_of(value), json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "PIECE_BYTES", piece_bytes)
        check_nesting(body, depth)
        if depth:
            with pytest.raises(NestedTooDeep, match=f"{depth} levels"):
                check_nesting(body, depth - 1)


def test_values_are_counted_and_not_made():
    check_values(json.dumps([1] * 1000).encode(), 1000)
    with pytest.raises(BodyTooLarge, match="json_values_max"):
        check_values(json.dumps([1] * 1001).encode(), 1000)
    with pytest.raises(BodyTooLarge, match="json_values_max"):
        check_values(json.dumps("a text that is as long as many numbers" * 1000).encode(), 1000)
    with pytest.raises(BodyTooLarge, match="json_values_max"):
        check_values(json.dumps("\\" * 1001).encode(), 1000)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x1a\x00" * 1000,  # empty datums
        b"\x1a\xd0\x0f" + b"\x0a\x00" * 1000,  # one datum of empty chunks
        b"\x3a\x00" * 1000,  # entries of a map
        b"\x1a\xdc\x0f\x12\xd9\x0f\x12\xd6\x0f\x22\xd3\x0f" + b"\x01" * 2003,  # the shape of a tensor, a byte a number
    ],
)
def test_a_message_of_many_small_things_is_refused_unseen(bomb: bytes):
    check_forward_backward(bomb, 4000)
    with pytest.raises(InvalidRequest, match="request_datums_max"):
        check_forward_backward(bomb, 10)


def test_an_honest_message_may_have_all_its_datums():
    made = message("m")
    for _ in range(9):
        made.data.append(made.data[0])
    made.data[0].model_input[0].encoded_text.tokens = b"\x0a\x00" * 100_000  # numbers that look like fields
    check_forward_backward(made.SerializeToString(), 10)
    with pytest.raises(InvalidRequest):
        check_forward_backward(made.SerializeToString(), 9)


@given(st.binary(max_size=60))
def test_what_is_no_protobuf_is_left_to_the_parser(body: bytes):
    check_forward_backward(body, 100)
