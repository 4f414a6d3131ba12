"""The cases of `gpu.py`: their names, the programs that each needs, and the order in which they run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from gpu_card import Card
from gpu_decoding import Rollouts, decode_case, ratio_case
from gpu_driver import Driver
from gpu_engine import RANK, Model
from gpu_table import Result
from gpu_training import TENANTS, micro_batches, optim_step, train

from tx_async.engine.engine import optim_program, train_program

ROOMY_GIB = 16
"""`activation_memory_gib` with which a row of 4,096 tokens of the 8B computes nothing again."""


class Session(NamedTuple):
    """One engine of one model."""

    model: Model
    driver: Driver
    rollouts: Rollouts
    card: Card
    seconds: float

    def train(self, rows: int, length: int, tenants: int) -> Result:
        return train(self.model, self.driver, self.card, rows, length, tenants, self.seconds)


class Case(NamedTuple):
    """What gives the results of these names."""

    names: tuple[str, ...]
    programs: Callable[[Session], Sequence[str]]
    run: Callable[[Session], Mapping[str, Result]]


class Stage(NamedTuple):
    """Cases whose programs are compiled together."""

    cases: tuple[Case, ...]
    config: Mapping[str, Any] = MappingProxyType({})
    """How their engine's configuration differs from the default; equal ones share an engine."""


# ---- which cases


def stages(options: argparse.Namespace) -> list[Stage]:
    """In the order in which they run: what has a goal first, and whatever needs no other program."""
    long_row, short_row, (small, *_, large) = options.long_row, options.short_row, options.batches
    of_large = [partial(_decode, large, context) for context in options.contexts]
    with_goals = (
        _train(long_row, 1),
        _long_prompt(options.long_prompt),
        *(case for of in of_large for case in (of(0), of(TENANTS))),
        *(_decode(small, context, 0) for context in options.contexts),
        _train(long_row, TENANTS),
        _beside(long_row, large, options.contexts[0]),
        *(of(1) for of in of_large),
        *(_prompts(large, context) for context in options.contexts),
    )
    others = (
        _train(short_row, 1),
        _train(short_row, TENANTS),
        _optim_step(),
        *(
            _decode(batch, context, adapters)
            for batch in options.batches[:-1]
            for context in options.contexts
            for adapters in (0, 1, TENANTS)
            if adapters <= batch and (batch, adapters) != (small, 0)
        ),
    )
    return [Stage(with_goals), Stage(others), Stage((_train_roomy(long_row),), {"activation_memory_gib": ROOMY_GIB})]


def _train(row: tuple[int, int], tenants: int) -> Case:
    rows, length = row
    name = f"train {rows}x{length}" + f", {tenants} tenants" * (tenants > 1)
    programs = [train_program(rows, length, 1, RANK, False)]
    return Case((name,), lambda _: programs, lambda session: {name: session.train(rows, length, tenants)})


def _train_roomy(row: tuple[int, int]) -> Case:
    rows, length = row
    name = f"train {rows}x{length}, activation_memory_gib {ROOMY_GIB}"
    return Case((name,), _train(row, 1).programs, lambda session: {name: session.train(rows, length, 1)})


def _optim_step() -> Case:
    return Case(
        ("optim_step",),
        lambda _: [optim_program(RANK)],
        lambda session: {"optim_step": optim_step(session.driver, session.card)},
    )


def _decode(batch: int, context: int, adapters: int) -> Case:
    names = [decode_case(batch, context, adapters)]
    names += [ratio_case(batch, context, adapters)] * (adapters > 1)

    def programs(session: Session) -> list[str]:
        mine, loading = session.rollouts, ["read_weights", "load_sampler"] if adapters else []
        # A smaller batch finds its prompts in the prefix cache; what it must prefill all the same is not timed.
        is_largest = batch == session.driver.info.num_sequences_max
        prefill = mine.prefill_programs(batch, context) if is_largest else []
        return [mine.program(batch, adapters), *prefill, *loading]

    return Case(tuple(names), programs, lambda session: session.rollouts.decode(batch, context, adapters))


def _long_prompt(context: int) -> Case:
    name = f"prefill {context}"

    def programs(session: Session) -> list[str]:
        return [session.rollouts.program(1, 0), *session.rollouts.prefill_programs(1, context)]

    return Case((name,), programs, lambda session: {name: session.rollouts.long_prompt(context)})


def _prompts(batch: int, context: int) -> Case:
    name = f"prefill {batch}x{context}"
    return Case((name,), lambda _: [], lambda session: {name: session.rollouts.prompts(batch, context)})


def _beside(row: tuple[int, int], batch: int, context: int) -> Case:
    training, decoding = f"train {row[0]}x{row[1]}, {TENANTS} tenants", decode_case(batch, context, TENANTS)
    names = f"{training}, beside decoding", f"{decoding}, beside training"

    def run(session: Session) -> dict[str, Result]:
        work = micro_batches(session.driver, *row, TENANTS)
        return dict(zip(names, session.rollouts.beside(work, batch, context, TENANTS), strict=True))

    parts = _train(row, TENANTS), _decode(batch, context, TENANTS)
    return Case(names, lambda session: [name for part in parts for name in part.programs(session)], run)
