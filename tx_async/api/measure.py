"""The cost of decoding a body, measured without decoding it: a few bytes can describe millions of objects,
and one call that makes them all holds the interpreter for as long as that takes.

All functions here go over the bytes a piece at a time, so that other threads get their turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from tx_async.errors import BodyTooLarge, InvalidRequest
from tx_async.wire import protobuf

PIECE_BYTES = 2**20
VALUES_PER_DATUM = 64
"""Fields of a datum, its chunks and tensors included; one with four inputs has some twenty."""

_ESCAPES = re.compile(rb"\\.", re.DOTALL)
_QUOTE, _OPEN, _CLOSE = ord('"'), (ord("["), ord("{")), (ord("]"), ord("}"))


def check_values(body: bytes, values_max: int) -> None:
    """Raises `BodyTooLarge` for JSON with more numbers, texts and containers: each follows a comma or a bracket, and
    each becomes an object."""
    if len(body) <= values_max:
        return
    num_values = sum(
        body.count(sign, start, start + PIECE_BYTES)
        for start in range(0, len(body), PIECE_BYTES)
        for sign in (b",", b"[", b"{")
    )
    if num_values > values_max:
        raise BodyTooLarge(
            f"The request body has about {num_values} numbers and texts; as JSON {values_max} are allowed "
            "(`json_values_max`): send smaller pieces, or protobuf."
        )


def check_nesting(body: bytes, depth_max: int) -> None:
    """Raises `InvalidRequest`. Brackets within texts do not count."""
    if body.count(b"[") + body.count(b"{") <= depth_max:
        return
    if b"\\" in body:
        body = _ESCAPES.sub(b"", body)
    characters = np.frombuffer(body, np.uint8)
    quotes = np.flatnonzero(characters == _QUOTE)
    opening = np.flatnonzero((characters == _OPEN[0]) | (characters == _OPEN[1]))
    closing = np.flatnonzero((characters == _CLOSE[0]) | (characters == _CLOSE[1]))
    places = np.concatenate([_outside(opening, quotes), _outside(closing, quotes)])
    steps = np.ones(len(places), np.int64)
    steps[len(_outside(opening, quotes)) :] = -1
    depth = int(np.cumsum(steps[np.argsort(places, kind="stable")]).max(initial=0))
    if depth > depth_max:
        raise NestedTooDeep(f"The request body nests {depth} levels deep; {depth_max} are allowed (`json_depth_max`).")


class NestedTooDeep(InvalidRequest):
    """The request body nests too deep (`json_depth_max`)."""


def _outside(places: np.ndarray, quotes: np.ndarray) -> np.ndarray:
    """The places that an even number of quotes precedes."""
    return places[np.searchsorted(quotes, places) % 2 == 0]


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
    """Raises `InvalidRequest` for more datums, or more fields, than so many datums have. A body that is not protobuf at
    all is left to the parser to refuse."""
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
