"""Imports point one way: `wire` at the bottom, `api` on the scheduler's interface, and a line of ZeroMQ through the
middle, with no JAX above it and no web framework below."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tx_async"

WEB = ("starlette", "hypercorn")
DEVICE = ("jax", "jaxlib", "flax", "optax")
SQL = ("aiosqlite", "asyncpg", "sqlite3")
WIRE = ("tx_async.wire", "tx_async.errors")
#: what decides without I/O
PURE = (
    "tx_async.scheduler.core",
    "tx_async.scheduler.training",
    "tx_async.scheduler.sampling",
    "tx_async.scheduler.interface",
    *WIRE,
)

#: folder or module -> what it must not import, besides what `ONLY` leaves it
NEVER = {
    "app": DEVICE,
    "serve": DEVICE,
    "api": (*DEVICE, *SQL, "zmq", "tx_async.journal", "tx_async.dispatch", "tx_async.worker", "tx_async.engine"),
    "dashboard": (*DEVICE, *SQL, "zmq", "tx_async.journal", "tx_async.dispatch", "tx_async.worker", "tx_async.engine"),
    "scheduler": (
        *DEVICE,
        *WEB,
        *SQL,
        "zmq",
        "tx_async.engine",
        "tx_async.models",
        "tx_async.api",
        "tx_async.dispatch.router",
    ),
    "journal": (*DEVICE, *WEB, "zmq", "tx_async.api", "tx_async.scheduler", "tx_async.dispatch", "tx_async.engine"),
    "dispatch": (*DEVICE, *WEB, *SQL, "tx_async.api", "tx_async.scheduler", "tx_async.journal", "tx_async.engine"),
    "storage": (*DEVICE, *WEB, *SQL, "zmq", "tx_async.api", "tx_async.scheduler", "tx_async.engine"),
    "worker": (*DEVICE, *WEB, *SQL, "tx_async.api", "tx_async.scheduler", "tx_async.journal"),
    "engine": (*WEB, *SQL, "zmq", "tx_async.api", "tx_async.scheduler", "tx_async.journal", "tx_async.dispatch"),
    "models": (*WEB, *SQL, "zmq", "tx_async.api", "tx_async.scheduler", "tx_async.journal", "tx_async.engine"),
    "layers": (*WEB, *SQL, "zmq", "tx_async.api", "tx_async.scheduler", "tx_async.models", "tx_async.engine"),
}
#: folder or module -> the only parts of this package that it may import
ONLY = {
    "wire": WIRE,
    "errors": (),
    "clock": (),
    "metrics": ("tx_async.field_docs",),
    "scheduler/interface": WIRE,
    "scheduler/core": PURE,
    "scheduler/training": PURE,
    "scheduler/sampling": PURE,
    "worker/engine_api": WIRE,
    "layers": ("tx_async.layers", *WIRE),
    "engine/sharding": ("tx_async.layers", "tx_async.models", *WIRE),
}


def modules(place: str) -> list[Path]:
    file = PACKAGE / f"{place}.py"
    return [file] if file.exists() else sorted((PACKAGE / place).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports at run time, wherever in the file; not what stands under TYPE_CHECKING."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        match node := pending.pop():
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                pending += node.orelse
                continue
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom(module=str(module)):
                assert node.level == 0, f"{path}: relative import"
                found |= {f"{module}.{alias.name}" for alias in node.names}
        pending += ast.iter_child_nodes(node)
    return found


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


@pytest.mark.parametrize("place", sorted(NEVER))
def test_a_station_does_not_import_what_lies_behind_it(place: str):
    files = modules(place)
    assert files
    wrong = {
        (str(path.relative_to(ROOT)), name) for path in files for name in imports(path) if within(name, NEVER[place])
    }
    assert not wrong


@pytest.mark.parametrize("place", sorted(ONLY))
def test_a_leaf_imports_nothing_of_the_package_but_what_is_below_it(place: str):
    files = modules(place)
    assert files
    own = {
        (str(path.relative_to(ROOT)), name) for path in files for name in imports(path) if within(name, ("tx_async",))
    }
    assert not {(path, name) for path, name in own if not within(name, ONLY[place])}


def modules_loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("side", ["tx_async.app", "tx_async.serve", "tx_async.cli", "tx_async.api.routes"])
def test_the_server_starts_without_jax(side: str):
    """Importing JAX takes seconds and grabs the devices: the process that answers HTTP never does, nor indirectly."""
    assert not modules_loaded_by(f"import {side}") & {*DEVICE, "torch", "transformers"}


def test_the_command_line_answers_help_without_loading_a_side():
    assert not modules_loaded_by("import tx_async.cli") & {*DEVICE, *WEB, "zmq", "tinker", "rich"}


def test_the_worker_starts_without_a_web_framework_and_before_jax():
    """The server hears of a worker before its engine is imported."""
    assert not modules_loaded_by("import tx_async.worker.main") & {*WEB, *DEVICE}
