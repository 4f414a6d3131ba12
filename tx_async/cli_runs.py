"""The commands about training runs of a running server: `tx-async runs` and `tx-async run`."""

from __future__ import annotations

import argparse
from typing import Any

from tx_async import cli_server
from tx_async.cli_numbers import at_least_one

SHOWN = ("step", "learning_rate", "loss", "grad_norm", "tokens", "tokens/s")


def add(commands: Any) -> None:
    runs = commands.add_parser(
        "runs",
        help="training runs of a running server",
        description="Prints id, base model, rank, state and last use, most recently used first: one API key's runs, "
        "or all for an admin's key.",
    )
    runs.add_argument("--newest", metavar="N", type=at_least_one, default=0, help="the N that were used last [all]")
    run = commands.add_parser(
        "run",
        help="the history of one training run, one line for each optimizer step",
        description="Older steps of a long run are thinned.",
    )
    run.add_argument("run_id", metavar="ID", help="as `tx-async runs` prints it")
    run.add_argument("--csv", action="store_true", help="everything that is known of each step, with a header row")
    for command, action in ((runs, _runs), (run, _run)):
        cli_server.add(command)
        command.set_defaults(run=action)


def _runs(args: argparse.Namespace) -> int:
    from tx_async import runs_command

    for run in runs_command.newest(*cli_server.chosen(args), args.newest):
        state = "corrupted" if run.corrupted else "ok"
        used = f"{run.last_request_time:%Y-%m-%d %H:%M:%S}"
        print(run.training_run_id, run.base_model, run.lora_rank, state, used, sep="\t")
    return 0


def _run(args: argparse.Namespace) -> int:
    from tx_async import runs_command

    if args.csv:
        print(runs_command.history_csv(*cli_server.chosen(args), args.run_id), end="")
        return 0
    rows = runs_command.history(*cli_server.chosen(args), args.run_id)
    print("\t".join(SHOWN))
    for row in rows:
        print("\t".join(runs_command.cells(row)))
    return 0
