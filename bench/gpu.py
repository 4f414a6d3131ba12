"""Training and decoding on an accelerator, as shares of what its arithmetic and memory allow: one command, one table.

    python bench/gpu.py [--models 8B 0.6B] [--budget 440] [--json [FILE]] [--tiny]

Qwen3 in bf16 with random weights made on the device: no network, no files. The engine is made as a worker makes its own
(kernels that passed their self-tests, a plan of the memory, 8 training and 8 sampler slots of rank 32) and driven by
the commands that the scheduler sends, in its turns. `gpu_table.py` has the goals, which are of the 8B.

- Each kernel beside its plain version: the largest difference, forward and in the gradients.
- train R x L: R packed rows of five sequences each. Useful FLOP are 4 N per token, N = all parameters; attention's and
  the adapter's own are not counted. With 8 tenants each row is of another adapter than the one before.
- decode B at C: a step of B sequences of C tokens each, temperature 1, of the base model, one adapter or eight. It must
  read once every weight that it multiplies with, the adapters that it uses and all keys and values; the share is of the
  memory's bandwidth. "8 adapters / none" is the ratio of the rates.
- prefill: one long prompt, and all prompts of a batch, until the first token. FLOP of the layers' products and of
  causal attention.
- optim_step: of one adapter; A, B, both moments and the gradients are read and written once.
- Training beside decoding: both rates, and what is left of each alone.

Shares are of the card's specification, where `gpu_card.py` knows it, and of what a large product and a large array
gave before. Everything ends within --budget seconds, compilation included: what does not fit is listed as skipped, and
each result is printed as soon as it is known, those with a goal first. Programs stay in .cache/bench-jax, so a second
run compiles nothing and measures what the first did not reach. --tiny tries all of it out with a model of two layers,
which a CPU runs in seconds.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tx_async.engine.devices import MEMORY_FRACTION

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))  # as a worker does, before JAX starts

import gpu_card
from gpu_cases import Session, Stage, stages
from gpu_compiling import compile_all
from gpu_decoding import Rollouts
from gpu_driver import Driver
from gpu_engine import SHAPES, Model
from gpu_kernels import comparisons, interpreted
from gpu_table import NOT_REACHED, Table, reason
from gpu_training import create_adapters

from tx_async.engine import compilation
from tx_async.engine.engine import JaxEngine
from tx_async.engine.kernels import Differences
from tx_async.engine.platform import current

ROOT = Path(__file__).parents[1]
FIRST_SHARE = 0.7
"""Of the time, for the first of several models."""
COMPILING_SHARE = 0.75
"""Of the time that is left, for the programs of one stage: then what is compiled is measured."""
TINY = {
    "models": ["tiny"],
    "long_row": (1, 256),
    "short_row": (4, 64),
    "batches": [1, 4],
    "contexts": [16, 32],
    "long_prompt": 64,
    "seconds": 0.2,
}


class Run(NamedTuple):
    """One run of this script."""

    options: argparse.Namespace
    card: gpu_card.Card
    table: Table
    comparisons: list[Callable[[], None]]
    """Of kernels, which are made while the first programs are compiled."""


def measure_model(name: str, run: Run, deadline: float) -> None:
    """deadline: seconds since the start."""
    model = Model(name)
    try:
        left, taken = stages(run.options), 0.0
        while left:
            config = left[0].config
            mine = [stage for stage in left if stage.config == config]
            left = [stage for stage in left if stage.config != config]
            with model.engine(sample_max_num_sequences=max(run.options.batches), **config) as engine:
                driver = Driver(engine)
                rollouts = Rollouts(model, driver, run.card, run.options.seconds)
                session = Session(model, driver, rollouts, run.card, run.options.seconds)
                if not config:
                    run.table.note(name, _lines_of(engine))
                create_adapters(driver)
                for stage in mine:
                    taken = run_stage(name, stage, session, run, deadline, taken)
                driver.close()
            gc.collect()
    finally:
        model.delete()


def _lines_of(engine: JaxEngine) -> list[str]:
    planned = engine.memory.lines() if engine.memory else ()
    return [*map(str, engine.kernel_uses), *(line for line in planned if line.startswith(("context", "rows", "slots")))]


def run_stage(model: str, stage: Stage, session: Session, run: Run, deadline: float, taken: float) -> float:
    """taken: seconds for the compilation of the stage before; -> those of this one."""
    table, programs = run.table, {program.name: program for program in session.driver.engine.programs}
    wanted = dict.fromkeys(name for case in stage.cases for name in case.programs(session))
    if table.elapsed + taken > deadline:
        why = f"there is no time to compile the {len(wanted)} programs that it and others need"
        table.skip(model, [name for case in stage.cases for name in case.names], why)
        return taken
    began, beside = time.monotonic(), run.comparisons.copy()
    run.comparisons.clear()
    failed = compile_all(
        [programs[name] for name in wanted],
        session.model.here.compile_threads,
        COMPILING_SHARE * max(0.0, deadline - table.elapsed),
        lambda text: table.say(f"{model}: {text}"),
        beside,
    )
    taken = time.monotonic() - began
    for case in stage.cases:
        why = next((failed[name] for name in case.programs(session) if name in failed), None)
        if why:
            table.skip(model, case.names, why)
        else:
            table.run(model, case.names, deadline, partial(case.run, session))
    return taken


def kernel_tasks(table: Table) -> list[Callable[[], None]]:
    def compare(name: str, difference: Callable[[], Differences]) -> None:
        try:
            table.differs(name, difference())
        except Exception as error:  # the plain version runs instead
            table.differs(name, reason(error))

    found = comparisons() if current().flash_kernel else interpreted()
    table.kernels = dict.fromkeys(found, NOT_REACHED)
    return [partial(compare, name, of) for name, of in found.items()]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["8B", "0.6B"], help="in this order")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128], help="of decoding")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096], help="tokens of each prompt")
    parser.add_argument("--seconds", type=float, default=2, help="of measuring in each case")
    parser.add_argument("--budget", type=float, default=440, help="seconds for everything")
    parser.add_argument("--json", nargs="?", const="-", default="", help="write it here, or instead of the table")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    options.long_row, options.short_row, options.long_prompt = (1, 4096), (4, 512), 8192
    if options.tiny:
        vars(options).update(TINY)
    options.batches, options.contexts = sorted({1, *options.batches}), sorted(set(options.contexts))
    if len(options.batches) == 1:
        parser.error("--batches names no batch of more than one")
    return options


def check_device(options: argparse.Namespace) -> None:
    if current().name == "cpu" and not options.tiny:
        sys.exit("JAX finds no accelerator here: pip install 'tx-async[gpu]' (--tiny tries the script out on a CPU)")


def main() -> None:
    options = parse()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    cases = [name for stage in stages(options) for case in stage.cases for name in case.names]
    table = Table(options.models, cases, options.budget, options.json)
    table.end_in_time()
    check_device(options)
    compilation.use_cache(os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(ROOT / ".cache" / "bench-jax"))
    table.card = card = gpu_card.measure()
    table.say(str(card))
    run = Run(options, card, table, kernel_tasks(table))
    for number, name in enumerate(options.models):
        is_last = number + 1 == len(options.models)
        try:
            measure_model(name, run, options.budget * (1 if is_last else FIRST_SHARE))
        except Exception as error:  # it does not fit: another model may
            table.fail(name, error)
        gc.collect()
    for compare in run.comparisons:  # no model came so far
        compare()
    table.print()
    os._exit(0)  # a compilation that nobody waits for any more would keep the process


if __name__ == "__main__":
    main()
