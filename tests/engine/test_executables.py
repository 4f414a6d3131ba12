"""What one process compiled, the next one loads; and never something else in its place."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import tx_async
from tx_async.engine import executables
from tx_async.engine.compilation import CompilationCounter, Program
from tx_async.engine.executables import Executables

ROOT = Path(__file__).parents[2]
X = np.arange(4, dtype=np.float32)


def scaled(factor, x):
    return factor * x


class Maker:
    """Makes the same program each time, as processes that start one after another do."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.factor = float(np.random.default_rng().random())  # JAX's own cache cannot know the program

    def __call__(self, function=None, arguments=(X,), **settings) -> Program:
        made = Program("scaled", function or partial(scaled, self.factor), arguments, **settings)
        made.executables = Executables(self.folder)
        return made

    def assert_right(self, program: Program) -> None:
        np.testing.assert_array_equal(program(X), np.float32(self.factor) * X)

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.executable"))


@pytest.fixture
def program(tmp_path) -> Maker:
    return Maker(tmp_path / "executables")


def num_compiled(program: Program) -> int:
    counter = CompilationCounter()
    program.compile()
    counter.close()
    return counter.count


def test_a_program_is_compiled_once_and_then_loaded(program):
    assert num_compiled(program()) == 1
    again = program()
    assert num_compiled(again) == 0
    program.assert_right(again)
    with pytest.raises(TypeError):
        again(np.zeros(5, np.float32))


def test_a_loaded_program_takes_over_the_memory_it_was_given(program):
    for _ in range(2):
        x = jax.device_put(X)
        program(donate=(0,))(x)
        assert x.is_deleted()
    assert len(program.files) == 1


def test_what_jax_has_in_memory_is_not_kept_because_it_may_have_been_loaded(program):
    function = partial(scaled, program.factor)
    Program("scaled", function, (X,)).compile()
    again = program(function)
    assert num_compiled(again) == 0 and not program.files
    program.assert_right(again)


@pytest.mark.parametrize(
    "other",
    [
        {"function": partial(scaled, 2.0)},
        {"arguments": (np.zeros(5, np.float32),)},
        {"arguments": (np.zeros(4, np.int32),)},
        {"donate": (0,)},
        {"options": {"xla_embed_ir_in_executable": True}},
    ],
    ids=["bound value", "shape", "dtype", "donation", "compiler options"],
)
def test_another_program_is_never_taken_for_it(program, other):
    program().compile()
    assert num_compiled(program(**other)) == 1


def test_a_change_of_the_sources_makes_every_program_another(program, tmp_path, monkeypatch):
    program().compile()
    copy = shutil.copytree(Path(tx_async.__file__).parent, tmp_path / "tx_async")
    monkeypatch.setattr(tx_async, "__file__", str(copy / "__init__.py"))
    assert num_compiled(program()) == 0
    with (copy / "layers" / "rope.py").open("a") as source:
        source.write("\n")
    assert num_compiled(program()) == 1


def test_what_changes_the_compiler_makes_every_program_another(program, monkeypatch):
    program().compile()
    with jax.default_matmul_precision("bfloat16"):
        assert num_compiled(program()) == 1
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert num_compiled(program()) == 1


@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: hashlib.sha256(b"no pickle").digest() + b"no pickle",
    ],
    ids=["empty", "cut", "not loadable"],
)
def test_a_file_that_cannot_be_loaded_is_made_anew(program, damaged, caplog):
    program().compile()
    (path,) = program.files
    path.write_bytes(damaged(path.read_bytes()))
    again = program()
    assert num_compiled(again) == 1
    program.assert_right(again)
    assert "compiled again" in caplog.text


def test_what_came_out_of_the_cache_of_jax_is_not_kept(program):
    """It cannot be serialized a second time: loaded again, it fails where it runs."""
    program().compile()
    program.files[0].unlink()
    for _ in range(2):
        again = program()
        assert num_compiled(again) == 1  # which counts what JAX loads, too
        program.assert_right(again)
    assert not program.files


def test_a_function_without_a_value_of_its_own_is_compiled_each_time(program):
    factor = program.factor
    for _ in range(2):
        assert num_compiled(program(lambda x: factor * x)) == 1
    assert not program.files


def test_a_folder_that_takes_nothing_costs_a_warning(program, caplog):
    one = program()
    shutil.rmtree(program.folder)
    program.assert_right(one)
    assert "cannot be kept" in caplog.text


def test_a_start_removes_what_was_used_longest_ago_and_what_was_abandoned(program, monkeypatch):
    for factor in (1.0, 2.0, 3.0):
        program(partial(scaled, program.factor + factor)).compile()
    paths, now = program.files, time.time()
    for age, path in enumerate(paths):
        os.utime(path, (now - age, now - age))
    abandoned, running = (program.folder / name for name in ("a.incomplete", "b.incomplete"))
    for path, age in ((abandoned, executables.ABANDONED_S + 60), (running, 60)):
        path.touch()
        os.utime(path, (now - age, now - age))
    monkeypatch.setattr(executables, "BYTES_MAX", sum(path.stat().st_size for path in paths[:2]))
    Executables(program.folder)
    assert program.files == sorted(paths[:2])
    assert running.exists() and not abandoned.exists()


START = """
import hashlib, jax, sys
from tx_async.engine.engine import create
from tx_async.testing.engine_bench import EngineBench, segment
from tx_async.wire.worker import EngineConfig, Welcome

model, cache, checkpoints = sys.argv[1:]
config = EngineConfig(compilation_cache_dir=cache, max_context_length=64, max_lora_adapters=2, max_lora_rank=8)
welcome = Welcome(
    base_model=model, engine=config, checkpoints_base=checkpoints, heartbeat_interval_ms=1000, lease_ms=1000
)
bench = EngineBench(create(welcome, lambda *report: None))
before = bench.engine.num_compilations
bench.create(0)
logprobs, losses = bench.train((0, [segment(20)]))
bench.step(0)
bits = b"".join(array.tobytes() for array in (logprobs, losses, *jax.tree.leaves(bench.state(0))))
print(bench.engine.num_compilations - before, hashlib.sha256(bits).hexdigest())
"""


def test_the_second_start_of_an_engine_compiles_no_program_and_computes_the_same_bits(tiny_qwen3, tmp_path):
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    command = [sys.executable, "-c", START, str(tiny_qwen3), str(tmp_path / "cache"), str(tmp_path)]

    def start() -> tuple[int, str]:
        found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        printed = re.fullmatch(r"(\d+) (\w+)\n", found.stdout)
        assert printed, found.stdout + found.stderr
        return int(printed[1]), printed[2]

    (compiled, bits), (compiled_again, bits_again) = start(), start()
    assert bits == bits_again
    assert compiled - compiled_again == len(list((tmp_path / "cache" / "executables").iterdir())) >= 3
