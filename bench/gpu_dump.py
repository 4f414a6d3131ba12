"""What XLA's own dump of a compiled GPU program says that a run of it would cost the host.

The dump holds every step of a program (a thunk) in order, nested by indentation:

    000: kCommandBuffer …            a CUDA graph: one launch for all that it holds
        001: kCustomKernel … name
    009: kWhile …                    outside of a graph: the host asks the device before each turn, a round trip
    condition:
        010: kCustomKernel …
      body:
        000: kCommandBuffer …
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

STEP = re.compile(r"^(\s*)(\d+): (k\w+)\s*(.*)$")
BRANCH = re.compile(r"^(\s*)(\w*branch\w*):$")
WORK = {"kCustomKernel", "kKernel", "kGemm", "kCublasLtMatmul", "kCuDnn", "kFft", "kTriangularSolve", "kCustomCall",
        "kConvolution", "kCopy", "kMemset32BitValue", "kMemzero", "kSelectK", "kCubSort", "kRaggedDot"}  # fmt: skip
"""Steps that are one launch of a kernel or a copy on the device."""
ASKING = {"kWhile", "kConditional"}
GRAPH = "kCommandBuffer"
COLLECTIVE = re.compile(
    r"^k(AllReduce|AllGather|ReduceScatter|AllToAll|CollectivePermute|RaggedAllToAll)(Start)?$|^kCollectiveKernel$"
)
"""The last is a small all-reduce as a kernel of XLA's own."""


@dataclass
class Step:
    kind: str
    text: str = ""
    children: list[Step] = field(default_factory=list)

    def walk(self, in_graph: bool = False) -> Iterator[tuple[Step, bool]]:
        """Every step below this one, and whether it stands in a CUDA graph."""
        for child in self.children:
            yield child, in_graph
            yield from child.walk(in_graph or child.kind == GRAPH)

    @property
    def kernels(self) -> int:
        return sum(step.kind in WORK for step, _ in self.walk())

    @property
    def launches(self) -> int:
        """What the host launches: kernels outside of graphs, and graphs."""
        return sum((step.kind in WORK or step.kind == GRAPH) and not in_graph for step, in_graph in self.walk())

    @property
    def round_trips(self) -> int:
        """Loops and branches outside of graphs, each turn of which the host waits for; nested ones once."""
        return sum(step.kind in ASKING and not in_graph for step, in_graph in self.walk())

    @property
    def weight_copies(self) -> int:
        """Pieces that are copied out of a stack before they are used."""
        slices = (step for step, _ in self.walk() if step.kind == "kDynamicSliceFusion")
        return sum(any(child.kind == "kCopy" for child, _ in step.walk()) for step in slices)

    @property
    def collectives(self) -> int:
        """Those of every run: of a branch, the side with least."""
        sides = [child for child in self.children if child.kind == "branch"]
        steps = [child for child in self.children if child.kind != "branch"]
        least = min((side.collectives for side in sides), default=0)
        return least + sum(is_collective(step.kind) + step.collectives for step in steps)


def read(text: str) -> Step:
    root = Step("program")
    open_steps: list[tuple[int, Step]] = [(-1, root)]
    for line in text.splitlines():
        if side := BRANCH.match(line):
            indent, kind, rest = len(side[1]), "branch", side[2]
        elif found := STEP.match(line):
            indent, kind, rest = len(found[1]), found[3], found[4]
        else:
            continue
        while indent <= open_steps[-1][0]:
            open_steps.pop()
        step = Step(kind, rest)
        open_steps[-1][1].children.append(step)
        open_steps.append((indent, step))
    return root


def thunks(folder: Path) -> Step:
    """Of the largest program that was dumped there; as the passes left it, where they changed anything."""
    for name in ("thunk_sequence_after_thunk_passes", "thunk_sequence"):
        if files := sorted(folder.glob(f"*.{name}.txt"), key=lambda path: path.stat().st_size):
            return read(files[-1].read_text())
    raise FileNotFoundError(f"{folder} holds no thunk sequence")


def loops(step: Step) -> list[Step]:
    """Loops directly in a step (not in another loop or branch), the one with most kernels first."""
    found: list[Step] = []

    def look(at: Step) -> None:
        for child in at.children:
            if child.kind == "kWhile":
                found.append(child)
            elif child.kind not in ASKING:
                look(child)

    look(step)
    return sorted(found, key=lambda loop: -loop.kernels)


# ---- of unrolled layers: which kernels are theirs, by the names of what they were made from

THUNK = re.compile(r"thunk_metadata \{\s+thunk_info \{(?P<info>[^}]*)\}\s+thunk_kind: \"(?P<kind>\w+)\"", re.DOTALL)
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
SHARED = re.compile(r" (constant|broadcast|iota)\(")
"""What the compiler makes once for all that has the same: it bears the name of one of them."""
COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\{$")
GATHERED = re.compile(r"all-gather.*op_name=\"params\[")
"""A weight that is gathered is named after the weight, not after who needs it."""


def steps_of(folder: Path, scope: str, is_counted: Callable[[str], bool]) -> int:
    """Steps of the counted kinds whose instruction, or anything in its fusion, was traced within the function `scope`;
    what the compiler added, and no function traced, belongs to what it was added for."""
    made = scopes(optimized(folder), scope)
    found = THUNK.finditer(_newest(folder, "thunk_metadata.txt"))
    names = ((match["kind"], re.search(r'profile_annotation: "([^"]*)"', match["info"])) for match in found)
    return sum(is_counted(kind) and name is not None and name[1] in made for kind, name in names)


def is_work(kind: str) -> bool:
    return kind in WORK


def is_collective(kind: str) -> bool:
    return bool(COLLECTIVE.match(kind))


def optimized(folder: Path) -> str:
    """The optimized program of the largest that was dumped there."""
    return _newest(folder, "gpu_after_optimizations.txt")


def scopes(text: str, scope: str) -> set[str]:
    """Instructions of an optimized program that belong to `scope`."""
    inside: set[str] = set()
    fusions: dict[str, str] = {}
    computation = ""
    computations: set[str] = set()
    users: dict[str, list[str]] = {}
    gathered: dict[str, str] = {}
    order: list[str] = []
    traced: set[str] = set()
    for line in text.splitlines():
        if begins := COMPUTATION.match(line):
            computation = begins[1].lstrip("%")
        elif instruction := INSTRUCTION.match(line):
            if called := re.search(r"calls=%?([\w.\-]+)", line):
                fusions[instruction[1]] = called[1]
            if f"jit({scope})" in line and not SHARED.search(line):
                inside.add(instruction[1])
                computations.add(computation)
            for operand in re.findall(r"%([\w.\-]+)", line.split(", metadata=")[0])[1:]:
                users.setdefault(operand, []).append(instruction[1])
            if GATHERED.search(line):
                gathered[instruction[1]] = computation
            elif "op_name=" in line:
                traced |= {computation, instruction[1]}
            order.append(instruction[1])
    inside |= {name for name, called in fusions.items() if called in computations}
    for name in reversed(order):  # users stand below
        is_traced = name in traced or fusions.get(name) in traced
        if not is_traced and inside.intersection(users.get(name, ())):
            inside.add(name)
    called_inside = {fusions[name] for name in inside if name in fusions}
    return inside | {name for name, computation in gathered.items() if computation in called_inside}


def _newest(folder: Path, ending: str) -> str:
    return max(folder.glob(f"*{ending}"), key=lambda path: path.stat().st_size).read_text()
