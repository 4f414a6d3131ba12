"""The cost of decoding a body, measured without decoding it: a few bytes can describe millions of objects,
and one call that makes them all holds the interpreter for as long as that takes.

All functions here go over the bytes a piece at a time, so that other threads get their turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tx_async.errors import BodyTooLarge, InvalidRequest
from tx_async.wire import protobuf

PIECE_BYTES = 2**20
VALUES_PER_DATUM = 64
"""Fields of a datum, its chunks and tensors included; one with four inputs has some twenty."""

BYTES_PER_VALUE = 24
"""Of JSON: a number with all its digits, and a comma."""

_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_STEPS = np.zeros(256, np.int8)
"""How much deeper each character leads."""
_STEPS[[ord("["), ord("{")]] = 1
_STEPS[[ord("]"), ord("}")]] = -1


def check_values(body: bytes, values_max: int) -> None:
    """Raises `BodyTooLarge` for JSON with more numbers, texts and containers: each follows a comma or a bracket, and
    each becomes an object; and for JSON that is longer than so many numbers, or has more escapes in its texts."""
    if len(body) <= values_max:
        return
    if len(body) > BYTES_PER_VALUE * values_max:
        raise BodyTooLarge(
            f"The request body has {len(body)} bytes; as JSON {BYTES_PER_VALUE * values_max} are allowed "
            f"({BYTES_PER_VALUE} times `json_values_max`): send smaller pieces, or protobuf."
        )
    num_values = max(_num_signs(body, (b",", b"[", b"{")), _num_signs(body, (b"\\",)))
    if num_values > values_max:
        raise BodyTooLarge(
            f"The request body has about {num_values} numbers, texts and escapes; as JSON {values_max} are allowed "
            "(`json_values_max`): send smaller pieces, or protobuf."
        )


def check_nesting(body: bytes, depth_max: int) -> None:
    """Raises `InvalidRequest`. Brackets within texts do not count."""
    if _num_signs(body, (b"[", b"{")) <= depth_max:
        return
    depth = deepest = 0
    is_escaped = is_text = False
    for start in range(0, len(body), PIECE_BYTES):
        piece = np.frombuffer(body, np.uint8, min(PIECE_BYTES, len(body) - start), start)
        quotes, is_escaped = _ends_of_texts(piece, is_escaped)
        steps = _STEPS[piece]
        places = np.flatnonzero(steps)
        outside = places[(np.searchsorted(quotes, places) + is_text) % 2 == 0]
        depths = depth + np.cumsum(steps[outside], dtype=np.int64)
        deepest = max(deepest, int(depths.max(initial=0)))
        depth = int(depths[-1]) if depths.size else depth
        is_text = bool((len(quotes) + is_text) % 2)
    if deepest > depth_max:
        raise NestedTooDeep(
            f"The request body nests {deepest} levels deep; {depth_max} are allowed (`json_depth_max`)."
        )


def _num_signs(body: bytes, signs: tuple[bytes, ...]) -> int:
    return sum(
        body.count(sign, start, start + PIECE_BYTES) for start in range(0, len(body), PIECE_BYTES) for sign in signs
    )


def _ends_of_texts(piece: np.ndarray, is_escaped: bool) -> tuple[np.ndarray, bool]:
    """The places of quotes that no backslash escapes, and whether the piece ends with a backslash that escapes what
    follows. `is_escaped`: the piece before ended so."""
    quotes = np.flatnonzero(piece == _QUOTE)
    others = np.flatnonzero(piece != _BACKSLASH)
    if len(others) == len(piece) and not is_escaped:
        return quotes, False
    # A character is escaped by an odd number of backslashes that precede it.
    ends = np.append(others, len(piece))
    runs = np.diff(ends, prepend=-1) - 1
    runs[0] += is_escaped
    escaped = ends[runs % 2 == 1]
    return np.setdiff1d(quotes, escaped, assume_unique=True), bool(runs[-1] % 2)


class NestedTooDeep(InvalidRequest):
    """The request body nests too deep (`json_depth_max`)."""


# ---- protobuf

Schema = dict[int, "Schema | None"]
"""Field number -> the schema of the message that it holds, or None for packed numbers."""


def _schema(descriptor: Any) -> Schema:
    fields: Schema = {}
    for field in descriptor.fields:
        if field.message_type is not None:
            fields[field.number] = _schema(field.message_type)
        elif field.is_packed:
            fields[field.number] = None
    return fields


_FORWARD_BACKWARD = _schema(protobuf.ForwardBackwardRequest.DESCRIPTOR)
_DATA = protobuf.ForwardBackwardRequest.DESCRIPTOR.fields_by_name["data"].number


def check_forward_backward(body: bytes, datums_max: int) -> None:
    """Raises `InvalidRequest` for more than `datums_max` datums, or more fields than those have. A body that is not
    protobuf at all is left to the parser to refuse."""
    num_datums, num_values = 0, 0
    for number, start, stop in _fields(body, 0, len(body)):
        num_datums += number == _DATA
        num_values += 1 + _count(body, start, stop, _FORWARD_BACKWARD.get(number, {}), VALUES_PER_DATUM * datums_max)
        if num_datums > datums_max or num_values > VALUES_PER_DATUM * datums_max:
            raise InvalidRequest(
                f"The request has more than {datums_max} datums, or more fields than those need "
                "(`request_datums_max`): send fewer at once."
            )


def _count(body: bytes, start: int, stop: int, schema: Schema | None, room: int) -> int:
    """How many values a message holds, those of its inner messages included; counting ends beyond `room`."""
    if not schema:
        return stop - start if schema is None else 0
    num_values = 0
    for number, inner_start, inner_stop in _fields(body, start, stop):
        num_values += 1 + _count(body, inner_start, inner_stop, schema.get(number, {}), room - num_values)
        if num_values > room:
            break
    return num_values


def _fields(body: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(field number, where its content starts and stops) of each field; ends where it is not protobuf."""
    position = start
    while position < stop:
        try:
            tag, position = _varint(body, position)
            length = 0
            match tag & 7:
                case 0:
                    _, position = _varint(body, position)
                case 1:
                    position += 8
                case 2:
                    length, position = _varint(body, position)
                case 5:
                    position += 4
                case _:
                    return
        except IndexError:
            return
        yield tag >> 3, position, min(position + length, stop)
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = data[position]
    if value < 0x80:
        return value, position + 1
    value, shift = value & 0x7F, 7
    while True:
        position += 1
        byte = data[position]
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position + 1
        if shift > 70:
            raise IndexError
