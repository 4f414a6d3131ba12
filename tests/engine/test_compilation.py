"""No input compiles anything that was not known at start."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax._src import compilation_cache

from tx_async.engine import compilation, platform
from tx_async.engine.compilation import CompilationCounter, Program
from tx_async.engine.row_shapes import row_shapes
from tx_async.errors import ConfigError
from tx_async.testing.engine_bench import rl_segment, segment
from tx_async.wire.worker import (
    LOSS_FNS,
    AdmitSequences,
    EngineConfig,
    LoadSampler,
    SampleQuantum,
    SequenceSpec,
)

ROOT = Path(__file__).parents[2]
ONE_OF_EACH = {"train_row_lengths": (32, 64), "max_context_length": 64}


def random_training(bench, rng):
    """A micro-batch of any slots, lengths, losses, ranks and K, and sometimes a step."""
    length = int(rng.choice([32, 64]))
    parts, left = [], length
    while left > 0 and len(parts) < 4:
        size = int(rng.integers(1, left + 1))
        loss_fn = LOSS_FNS[rng.integers(len(LOSS_FNS))]
        parts.append((segment if loss_fn == "cross_entropy" else rl_segment)(size, int(rng.integers(99)), loss_fn))
        left -= size
    slot = int(rng.integers(4))
    bench.train((slot, parts), length=length, k=int(rng.choice([1, 8])), forward_only=bool(rng.integers(2)))
    if rng.integers(2):
        bench.step(slot, learning_rate=float(rng.random()), grad_clip_norm=float(rng.integers(2)))


def random_checkpoint(bench, rng, number):
    slot, kind = int(rng.integers(4)), ["training", "snapshot", "sampler", "external"][rng.integers(4)]
    config = bench.create(slot, rank=int(rng.integers(1, 9)), train_mlp=bool(rng.integers(2)))
    bench.save(slot, config, f"run/{number}", kind)
    if rng.integers(2):
        bench.engine.checkpoints._cached.clear()
    bench.load((slot + 1) % 4, config, f"run/{number}", optimizer=kind in ("training", "snapshot"))
    bench.run(LoadSampler(sampler_slot=int(rng.integers(2)), key=f"run/{number}"))


def random_sampling(bench, rng, number):
    prompt = rng.integers(0, 256, int(rng.integers(1, 40))).astype(np.int32)
    spec = SequenceSpec(
        sequence_id=number,
        sampler_slot=int(rng.integers(-1, 2)),
        adapter_version=str(number),
        prompt_index=0,
        max_tokens=int(rng.integers(1, 12)),
        temperature=float(rng.random()),
        top_k=int(rng.integers(-1, 5)),
    )
    bench.run(AdmitSequences(sequences=(spec,)), [prompt])
    sampled = None
    while not (sampled and (sampled.finished or sampled.failed)):  # a slot that nothing was loaded into yet fails
        sampled = bench.run(SampleQuantum(decode_steps=4, prefill_tokens=64))[0]


def test_a_random_workload_compiles_nothing_new(make_bench, monkeypatch):
    monkeypatch.setattr("tx_async.engine.engine.TARGETS_PER_TOKEN", (1, 8))
    bench = make_bench(compile_ahead=True, **ONE_OF_EACH)
    compiled, rng = bench.engine.num_compilations, np.random.default_rng(0)
    for slot in range(4):
        bench.create(slot, rank=slot + 1)
    for number in range(25):
        random_training(bench, rng)
        random_checkpoint(bench, rng, number)
        random_sampling(bench, rng, number)
    assert bench.engine.num_compilations == compiled


def test_compiling_ahead_compiles_both_halves_and_reports_its_progress(bench):
    training, sampling = (Program(name, lambda x: x + 1, (np.float32(2),)) for name in ("training", "sampling"))
    bench.engine._programs, bench.engine.sampling.programs = {"a": training}, {"b": sampling}
    reports = []
    bench.engine.compile_ahead(lambda *report: reports.append(report))
    assert reports == [("compiling", 0, 2), ("compiling", 1, 2), ("compiling", 2, 2)]
    assert [repr(program) for program in (training, sampling)] == [
        "<Program training: compiled>",
        "<Program sampling: compiled>",
    ]


def test_a_program_refuses_other_shapes_instead_of_compiling():
    program = Program("double", lambda x: 2 * x, (np.zeros(3, np.float32),))
    counter = CompilationCounter()
    np.testing.assert_array_equal(program(np.ones(3, np.float32)), 2)
    assert counter.count == 1
    with pytest.raises(TypeError):
        program(np.ones(4, np.float32))
    program(np.zeros(3, np.float32))
    assert counter.count == 1
    counter.close()


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        (EngineConfig(), "cpu", ((1, 32), (1, 64), (1, 100))),
        (EngineConfig(train_row_lengths=(80, 40)), "cpu", ((1, 40), (1, 80), (1, 100))),
        (EngineConfig(train_row_lengths=(50, 400)), "gpu", ((40, 50), (20, 100))),
        (EngineConfig(train_micro_batch_size=3), "gpu", ((3, 100),)),  # rows below 512 tokens do not exist
        (EngineConfig(train_micro_batch_tokens=128), "cpu", ((4, 32), (2, 64), (1, 100))),
        # Along `fsdp` each device has rows of its own, as many as another.
        (EngineConfig(fully_sharded_data_parallel_size=8), "cpu", ((8, 32), (8, 64), (8, 100))),
        (
            EngineConfig(fully_sharded_data_parallel_size=8, train_row_lengths=(50,), train_micro_batch_size=9),
            "gpu",
            ((16, 50), (16, 100)),
        ),
        (
            EngineConfig(fully_sharded_data_parallel_size=2, train_row_lengths=(50,), train_micro_batch_tokens=100),
            "gpu",
            ((4, 50), (2, 100)),
        ),
    ],
)
def test_shapes_of_micro_batches_are_few_and_reach_the_context(config, name, expected):
    assert row_shapes(config, 100, platform.of(name)) == expected


def test_a_cache_that_cannot_be_written_is_the_operators_to_change(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"compilation_cache_dir .*file/cache cannot be made or written on host"):
        compilation.use_cache(str(tmp_path / "file" / "cache"))


def test_a_cache_whose_writer_was_killed_is_usable_again(tmp_path):
    """In a process of its own: the cache of this one is chosen already."""
    (tmp_path / "jit_killed-0123-cache").write_bytes(b"half")
    code = f"""
import jax
from tx_async.engine.compilation import use_cache
use_cache({str(tmp_path)!r})
jax.jit(lambda x: x + 1)(1)
"""
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment, cwd=ROOT)
    names = [path.name for path in tmp_path.iterdir()]
    assert any(name.endswith("-cache") for name in names) and not any("killed" in name for name in names)


def test_a_cache_keeps_what_was_used_last_and_stays_within_its_size(tmp_path):
    for used, name in enumerate(("oldest", "used again", "newest")):
        (tmp_path / f"{name}-cache").write_bytes(compilation_cache.compress_executable(b"program"))
        os.utime(tmp_path / f"{name}-cache", (used, used))
    os.utime(tmp_path / "oldest-cache", (7, 0))
    size = (tmp_path / "newest-cache").stat().st_size
    compilation._tidy(tmp_path, 2 * size)
    assert {path.name for path in tmp_path.iterdir()} == {"oldest-cache", "newest-cache"}


def test_no_program_copies_the_adapters_of_other_slots(bench):
    """A change replaces the stacks in place. One that copied them would cost every tenant's memory at each step."""
    slots = bench.engine.num_slots + 1
    stacks = re.compile(rf"= f32\[[12],{slots},[^\]]*\]\S* copy\(")
    rows = "1x32 K=1 rank=8"
    steps = [name for name in bench.engine._programs if name.startswith("optim_step")]
    assert steps
    for name in (*steps, "create_adapter", "load_state", "load_weights", f"forward_backward {rows}"):
        program = bench.engine._programs[name]
        program.compile()
        assert not stacks.findall(program._compiled.as_text()), name
