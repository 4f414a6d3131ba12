"""The table of `gpu.py`: every case with its result, or the reason why it has none. Each is printed as soon as it is
known, and all of them once more in the end, which comes in time."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpu_card import Card
from machine import describe

from tx_async.engine.kernels import TOLERANCE, Differences

NOT_REACHED = "not reached in time"
NOTHING_TO_COMPARE = "there is nothing to compare with"


class Goal(NamedTuple):
    """What the project set itself for the cases whose whole name matches `cases`."""

    cases: str
    least: float
    by: Literal["spec", "measured", "value"]
    """What is compared: the share of the card's specification (of what was measured, where that is unknown), the share
    of what was measured, or the value itself."""


GOALS = (
    Goal(r"train 1x4096(, 8 tenants|, activation_memory_gib 16)?", 0.46, "spec"),
    Goal(r"decode 1 at \d+", 0.75, "measured"),
    Goal(r"decode 128 at \d+", 0.60, "measured"),
    Goal(r"decode \d+ at \d+, 8 adapters / none", 0.85, "value"),
    Goal(r"prefill 8192", 0.50, "spec"),
)
GOALS_ARE_OF = "8B"


class Skipped(Exception):
    """Why a case does not run."""


class Result(NamedTuple):
    value: float
    unit: str
    of_spec: float | None = None
    """The share of the card's peak rate, or of its bandwidth; None where it is unknown."""
    of_measured: float | None = None
    """The share of the rate of a large product, or of the bandwidth, measured in the same run."""
    note: str = ""

    def columns(self) -> tuple[str, str, str]:
        digits = 0 if self.value >= 100 else 2
        return f"{self.value:,.{digits}f} {self.unit}".strip(), _percent(self.of_spec), _percent(self.of_measured)


def goal_of(model: str, case: str) -> Goal | None:
    if model != GOALS_ARE_OF:
        return None
    return next((goal for goal in GOALS if re.fullmatch(goal.cases, case)), None)


def verdict(goal: Goal | None, result: Result) -> str:
    """What a goal is, and whether it was reached; "" = there is none."""
    if goal is None:
        return ""
    found = result.value if goal.by == "value" else result.of_measured
    if goal.by == "spec" and result.of_spec is not None:
        found = result.of_spec
    assert found is not None
    return f"{goal.least:.0%}: {'passed' if found >= goal.least else 'MISSED'}"


class Table:
    """Every case by name: its result, or why it has none."""

    def __init__(self, models: Sequence[str], cases: Sequence[str], budget_s: float, json_to: str = ""):
        """json_to: a file, "-" = the output instead of a table, "" = nowhere."""
        self.budget_s, self.json_to = budget_s, json_to
        self.began = time.monotonic()
        #: (model, case) -> result or reason, in the order of the table
        self.rows: dict[tuple[str, str], Result | str] = {(m, c): NOT_REACHED for m in models for c in cases}
        #: what the kernels of the device differ by, or why nobody knows
        self.kernels: dict[str, Differences | str] = {}
        #: model -> what its engine said of itself: its kernels, its memory
        self.notes: dict[str, list[str]] = {}
        #: once it is measured
        self.card: Card | None = None
        #: seconds of the slowest case so far
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

    # ---- what becomes known

    def say(self, text: str) -> None:
        print(f"{self.elapsed:5.0f} s  {text}", file=sys.stderr, flush=True)

    def run(
        self, model: str, cases: Iterable[str], deadline: float, function: Callable[[], Mapping[str, Result]]
    ) -> None:
        """Run what gives the results of `cases`, unless it would likely end after `deadline` (seconds since the
        start)."""
        cases = list(cases)
        if self.elapsed + self.slowest_s > deadline:
            return self.skip(model, cases, NOT_REACHED)
        before = self.elapsed
        try:
            found = function()
            self.rows |= {(model, case): found.get(case, NOTHING_TO_COMPARE) for case in cases}
        except Exception as error:  # out of memory, a kernel that is missing: the other cases may still work
            self.skip(model, cases, reason(error))
        gc.collect()  # its buffers are free before the next case begins
        self.slowest_s = max(self.slowest_s, self.elapsed - before)
        for case in cases:
            if isinstance(row := self.rows[model, case], Result):
                self.say(f"{model} {case}: {_line(model, case, row)}")

    def skip(self, model: str, cases: Iterable[str], why: str) -> None:
        for case in cases:
            self.rows[model, case] = why
            self.say(f"{model} {case}: skipped: {why}")

    def fail(self, model: str, error: Exception) -> None:
        """Nothing more comes of this model."""
        self.skip(model, [c for (m, c), row in self.rows.items() if m == model and row == NOT_REACHED], reason(error))

    def differs(self, kernel: str, found: Differences | str) -> None:
        self.kernels[kernel] = found
        self.say(f"{kernel}: {' | '.join(_kernel_columns(found))}")

    def note(self, model: str, lines: Iterable[str]) -> None:
        self.notes[model] = list(lines)
        for text in self.notes[model]:
            self.say(f"{model}: {text}")

    # ---- the end

    def print(self) -> None:
        """Once, whoever comes first."""
        with self._lock:
            if self._is_printed:
                return
            self._is_printed = True
            answer = json.dumps(self._json(), indent=1)
            if self.json_to == "-":
                print(answer, flush=True)
                return
            print("\n".join(self.markdown()), flush=True)
            if self.json_to:
                Path(self.json_to).write_text(answer + "\n")

    def markdown(self) -> list[str]:
        """For `bench/README.md`."""
        lines = [str(self.card) if self.card else "The card was not measured.", ""]
        lines += ["| model | case | rate | of the spec | of what was measured | goal | |", "| --- " * 7 + "|"]
        for (model, case), row in self.rows.items():
            cells = (
                (*row.columns(), verdict(goal_of(model, case), row), row.note)
                if isinstance(row, Result)
                else ("–", "", "", "", f"skipped: {row}")
            )
            lines.append(_row(model, case, *cells))
        if self.kernels:
            lines += ["", "| kernel beside the plain version | forward | gradients | |", "| --- " * 4 + "|"]
            lines += [_row(kernel, *_kernel_columns(found)) for kernel, found in self.kernels.items()]
        lines += ["", *(f"- {model}: {text}" for model, texts in self.notes.items() for text in texts)]
        return [*lines, "", f"{self.elapsed:.0f} s in all."]

    def _json(self) -> dict[str, Any]:
        rows = [
            {"model": model, "case": case}
            | (
                row._asdict() | {"goal": verdict(goal_of(model, case), row)}
                if isinstance(row, Result)
                else {"skipped": row}
            )
            for (model, case), row in self.rows.items()
        ]
        kernels = {
            kernel: found if isinstance(found, str) else found._asdict() for kernel, found in self.kernels.items()
        }
        return {
            "benchmark": "gpu",
            "machine": describe(),
            "card": self.card._asdict() if self.card else {},
            "kernels": kernels,
            "notes": self.notes,
            "results": rows,
        }

    def _give_up(self) -> None:
        self.print()
        os._exit(0)


def _line(model: str, case: str, result: Result) -> str:
    rate, of_spec, of_measured = result.columns()
    parts = [rate, f"{of_spec} of the spec" * bool(of_spec), f"{of_measured} of what was measured" * bool(of_measured)]
    goal = verdict(goal_of(model, case), result)
    return ", ".join(part for part in (*parts, f"goal {goal}" * bool(goal), result.note) if part)


def _kernel_columns(found: Differences | str) -> tuple[str, str, str]:
    if isinstance(found, str):
        return "–", "–", found if found == NOT_REACHED else f"FAILED: {found}"
    is_right = found.largest <= TOLERANCE
    gradients = f"{found.gradients:.2g}" if found.gradients else ""
    return f"{found.forward:.2g}", gradients, f"{TOLERANCE} is allowed: {'passed' if is_right else 'DIFFERS'}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def reason(error: Exception) -> str:
    if isinstance(error, Skipped):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
