"""Fills the tables of `bench/README.md` from `bench/runs.json`, which holds every run: one median a cell.

python bench/figures.py            # after a new run was written into runs.json
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

import msgspec

PAGE = Path(__file__).with_name("README.md")
RUNS = Path(__file__).with_name("runs.json")
HEAD = (
    "| question | script | machine | tx_async | SkyRL tx | ratio | goal |\n| --- | --- | --- | --- | --- | --- | --- |"
)


class Figure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One question and what each run answered."""

    table: str
    question: str
    script: str
    unit: str
    machine: str
    tx_async: tuple[float, ...]
    skyrl_tx: tuple[float, ...] = ()
    """Of the peer, in the same hour on the same machine; () where it was not asked."""
    goal: str = ""

    def row(self) -> str:
        ratio = f"{_ratio(self):.1f}×" if self.skyrl_tx else ""
        cells = (
            self.question, f"`{self.script}`", self.machine, _cell(self.tx_async, self.unit),
            _cell(self.skyrl_tx, self.unit), ratio, self.goal,
        )  # fmt: skip
        return "| " + " | ".join(cells) + " |"


def _ratio(figure: Figure) -> float:
    """How many times better: of seconds, fewer are."""
    own, peer = median(figure.tx_async), median(figure.skyrl_tx)
    return peer / own if figure.unit == "s" else own / peer


def _cell(runs: tuple[float, ...], unit: str) -> str:
    if not runs:
        return ""
    middle = median(runs)
    number = f"{middle:,.0f}" if middle >= 100 else f"{middle:g}"
    return f"{number} {unit}" if unit.isalpha() or unit == "%" else number + (unit if unit in "×" else f" {unit}")


def figures() -> list[Figure]:
    return msgspec.json.decode(RUNS.read_bytes(), type=list[Figure])


def render(page: str) -> str:
    """The page with its tables filled."""
    for name in {figure.table for figure in figures()}:
        rows = "\n".join(figure.row() for figure in figures() if figure.table == name)
        pattern = rf"(<!-- table: {name} -->\n).*?(?=<!-- end -->)"
        page, found = re.subn(pattern, lambda match, rows=rows: f"{match[1]}{HEAD}\n{rows}\n", page, flags=re.DOTALL)
        assert found == 1, f"the page has {found} places for the table {name}"
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
