"""The table of `gpu.py`: every case with its result, or the reason why it has none; printed once, and in time."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from machine import describe

GOALS = {"train": 0.40, "decode 1": 0.75, "decode 128": 0.60}
NOT_REACHED = "not reached in time"


class Result(NamedTuple):
    tokens_per_s: float
    share: float
    of: str
    """What `share` is a share of."""
    note: str = ""


class Table:
    """Every case by name: its result, or why it has none."""

    def __init__(self, models: Sequence[str], cases: Sequence[str], budget_s: float, as_json: bool):
        self.budget_s, self.as_json = budget_s, as_json
        self.began = time.monotonic()
        #: (model, case) -> result or reason, in the order of the table
        self.rows: dict[tuple[str, str], Result | str] = {(m, c): NOT_REACHED for m in models for c in cases}
        #: of the device, once they are measured
        self.limits: dict[str, float] = {}
        #: seconds of the slowest case so far, its compilation included
        self.slowest_s = 0.0
        self._lock = threading.Lock()
        self._is_printed = False

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def end_in_time(self) -> None:
        """Print what there is when the time is over, and end the process whatever it is doing."""
        timer = threading.Timer(max(0.0, self.budget_s - self.elapsed), self._give_up)
        timer.daemon = True
        timer.start()

    def run(self, model: str, case: str, deadline: float, function: Callable[[], Result]) -> None:
        """Run a case, unless it would likely end after `deadline` (seconds since the start)."""
        if self.elapsed + self.slowest_s > deadline:
            return
        before = self.elapsed
        try:
            self.rows[model, case] = function()
        except Exception as error:  # out of memory, a kernel that is missing: the other cases may still work
            self.rows[model, case] = reason(error)
        gc.collect()  # its buffers are free before the next case begins
        self.slowest_s = max(self.slowest_s, self.elapsed - before)
        print(f"{self.elapsed:5.0f} s  {model} {case}: {self.rows[model, case]}", file=sys.stderr, flush=True)

    def fail(self, model: str, error: Exception) -> None:
        """Nothing more comes of this model."""
        for key, row in self.rows.items():
            if key[0] == model and row == NOT_REACHED:
                self.rows[key] = reason(error)

    def print(self) -> None:
        """Once, whoever comes first."""
        with self._lock:
            if not self._is_printed:
                self._is_printed = True
                self._print()

    def _print(self) -> None:
        if self.as_json:
            rows = [
                {"model": model, "case": case} | (row._asdict() if isinstance(row, Result) else {"skipped": row})
                for (model, case), row in self.rows.items()
            ]
            answer = {"benchmark": "gpu", "machine": describe(), "limits": self.limits, "results": rows}
            print(json.dumps(answer, indent=1), flush=True)
            return
        print(", ".join(f"{name}: {value}" for name, value in describe().items()))
        print(", ".join(f"{name}: {value:,.0f}" for name, value in self.limits.items()))
        print(f"{'model':6s} {'case':14s} {'tokens/s':>10s} {'share':>16s} {'goal':>6s}")
        for (model, case), row in self.rows.items():
            print(f"{model:6s} {case:14s} {_columns(case, row)}")
        print(f"{self.elapsed:.0f} s in all", flush=True)

    def _give_up(self) -> None:
        self.print()
        os._exit(0)


def _columns(case: str, row: Result | str) -> str:
    if isinstance(row, str):
        return f"skipped: {row}"
    wanted = GOALS.get(case, GOALS.get(case.split()[0]))
    goal = f"{wanted:.0%}" if wanted else "–"
    return f"{row.tokens_per_s:10,.0f} {f'{row.share:.1%} of {row.of}':>16s} {goal:>6s}  {row.note}"


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
