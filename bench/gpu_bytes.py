"""The bytes that one decode step reads and writes, from the buffers of its kernels.

Of every kernel in XLA's optimized program: its operands and its results, once each. Of what a kernel only takes pieces
out of, or changes in place, the pieces count: rows of the embedding, new keys in their pages. The pools of the cache
count as far as sequences live in them, and a branch as its cheapest side: no row asks for candidates, top-k or top-p.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
         "u64": 8, "f64": 8}  # fmt: skip
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
NAMES = re.compile(r"%([\w.\-]+(?:#\d+)?)")
"""Operands; `name#3` is an element of a tuple."""
ELEMENT = re.compile(r"[a-z]+\d*\[[\d,]*\]|\(\)")
SAME_BUFFER = {"bitcast", "reshape", "get-tuple-element", "optimization-barrier"}
NO_KERNEL = SAME_BUFFER | {"parameter", "constant", "tuple", "after-all", "partition-id", "replica-id"}
TAKES_PIECES = {"dynamic-slice", "slice", "gather"}
CHANGES_PIECES = {"dynamic-update-slice": 1, "scatter": 2}
"""opcode -> which operand holds what is written."""
COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all"}


@dataclass
class Instruction:
    name: str
    type: str
    opcode: str
    operands: list[str]
    text: str
    is_root: bool

    def called(self, *attributes: str) -> list[str]:
        found: list[str] = []
        for attribute in attributes:
            for match in re.finditer(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.text):
                found += re.findall(r"[\w.\-]+", match[1])
        return found


Computation = dict[str, Instruction]


def read(text: str) -> dict[str, Computation]:
    """The computations of an optimized program; its entry is also there as ""."""
    found: dict[str, Computation] = {}
    inside: Computation = {}
    for line in text.splitlines():
        if begins := COMPUTATION.match(line):
            inside = found[begins[2].lstrip("%")] = {}
            if begins[1]:
                found[""] = inside
        elif match := INSTRUCTION.match(line):
            arguments = _until_closed(match[5])
            operands = NAMES.findall(arguments)
            inside[match[2]] = Instruction(match[2], match[3], match[4], operands, match[5], bool(match[1]))
    return found


def _until_closed(text: str) -> str:
    depth = 1
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if not depth:
            return text[:i]
    return text


def _type(operand: str, around: Computation) -> str:
    name, _, element = operand.partition("#")
    type_ = around[name].type
    return ELEMENT.findall(type_)[int(element)] if element else type_


def size(type_: str) -> int:
    return sum(
        SIZES[kind] * prod(map(int, filter(None, dims.split(","))))
        for kind, dims in ARRAY.findall(type_)
        if kind in SIZES
    )


class Counter:
    """Counts what the kernels of computations touch."""

    def __init__(self, computations: dict[str, Computation], live: Callable[[Instruction, str], int | None]):
        """live: (kernel, type of an operand) -> what it touches of that operand where that is not all; else None."""
        self._computations, self._live = computations, live

    def kernels(self, computation: Computation, times: int = 1) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every kernel that a run of it starts, also in what it calls."""
        for instruction in computation.values():
            if instruction.opcode == "while":
                (body,) = instruction.called("body")
                yield from self.kernels(self._computations[body], times * _turns(instruction))
            elif instruction.opcode == "conditional":
                names = instruction.called("branch_computations", "true_computation", "false_computation")
                branches = [list(self.kernels(self._computations[name], times)) for name in names]
                yield from min(branches, key=lambda branch: sum(count for _, count in branch))
            elif instruction.opcode in ("call", "async-start"):
                for name in instruction.called("to_apply", "calls"):
                    yield from self.kernels(self._computations[name], times)
            elif instruction.opcode not in NO_KERNEL and not instruction.opcode.endswith("-done"):
                yield instruction.name, times * self._touched(instruction, computation)

    def _touched(self, kernel: Instruction, around: Computation) -> int:
        if kernel.opcode == "fusion":
            (called,) = kernel.called("calls")
            inside = self._computations[called]
            return sum(_read(x, inside) for x in inside.values() if x.opcode == "parameter") + _written(
                next(x for x in inside.values() if x.is_root), inside
            )
        if kernel.opcode in TAKES_PIECES or kernel.opcode in CHANGES_PIECES:
            operands = {
                name: Instruction(name, _type(name, around), "parameter", [], "", False) for name in kernel.operands
            }
            alone = operands | {kernel.name: kernel}
            return sum(_read(x, alone) for x in operands.values()) + _written(kernel, alone)
        touched = size(kernel.type)
        for name in kernel.operands:
            type_ = _type(name, around)
            live = self._live(kernel, type_)
            touched += size(type_) if live is None else live
        return touched


def largest_collective(text: str) -> int:
    """The bytes of the largest result of an exchange between devices."""
    instructions = (x for computation in read(text).values() for x in computation.values())
    return max((size(x.type) for x in instructions if x.opcode.removesuffix("-start") in COLLECTIVES), default=0)


def _turns(loop: Instruction) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
    return int(known[1]) if known else 1


def _read(array: Instruction, inside: Computation) -> int:
    """What is read of an array in a fusion."""
    whole, total = size(array.type), 0
    for user in inside.values():
        if array.name not in user.operands:
            continue
        is_only_first = user.operands[0] == array.name and array.name not in user.operands[1:]
        if user.opcode in SAME_BUFFER:
            total += _read(user, inside)
        elif user.opcode in TAKES_PIECES and is_only_first:
            total += size(user.type)
        elif not (user.opcode in CHANGES_PIECES and is_only_first):
            return whole
    return min(total, whole)


def _written(result: Instruction, inside: Computation) -> int:
    if result.opcode == "tuple":
        return sum(_written(inside[name], inside) for name in result.operands)
    if result.opcode in SAME_BUFFER and result.operands and result.operands[0] in inside:
        return _written(inside[result.operands[0]], inside)
    if result.opcode in CHANGES_PIECES:
        return size(inside[result.operands[CHANGES_PIECES[result.opcode]]].type)
    return size(result.type)


def of_a_step(text: str, is_in_layers: Callable[[str], bool], live: Callable[[str], int | None]) -> tuple[int, int]:
    """(bytes within the layers, bytes beside them) of one turn of the longest loop of an optimized program.
    is_in_layers: of a kernel that nothing traced; live: see `Counter`, for the operands of attention."""
    computations = read(text)
    bodies = [computations[x.called("body")[0]] for x in computations[""].values() if x.opcode == "while"]
    body = max(bodies, key=len)
    counter = Counter(computations, lambda kernel, type_: live(type_) if "/paged_attention/" in kernel.text else None)
    within = beside = 0
    for name, count in counter.kernels(body):
        traced = re.search(r'op_name="([^"]*)"', body[name].text) if name in body else None
        if "jit(_run_layers)" in traced[1] if traced else is_in_layers(name):
            within += count
        else:
            beside += count
    return within, beside
