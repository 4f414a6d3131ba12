"""`bench/gpu.py` is run by whoever has a GPU for a short while: it must work the first time, and end in time."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402
import gpu_card  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_compiling  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_table  # noqa: E402
from gpu_decoding import Rollouts  # noqa: E402
from gpu_driver import Answer, Driver, for_seconds, rates  # noqa: E402
from gpu_engine import SHAPES  # noqa: E402
from gpu_table import Result, Table, goal_of, verdict  # noqa: E402
from gpu_training import micro_batches  # noqa: E402

from tx_async.engine import memory_plan  # noqa: E402
from tx_async.engine.allocation import described_on  # noqa: E402
from tx_async.engine.devices import usable  # noqa: E402
from tx_async.engine.engine import JaxEngine  # noqa: E402
from tx_async.engine.kernels import ALL_KERNELS, Differences  # noqa: E402
from tx_async.engine.platform import ACCELERATOR  # noqa: E402
from tx_async.models.decoder import tree_of  # noqa: E402
from tx_async.models.load import from_config  # noqa: E402
from tx_async.storage.store import Store  # noqa: E402
from tx_async.wire.worker import EngineConfig  # noqa: E402

CARD = gpu_card.Card("NVIDIA H100 80GB HBM3", "580.1", "0.12", 989e12, 3.35e12, 700e12, 3e12)


def run(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--tiny", "--json", *arguments]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_case_of_the_gpu_benchmark_gives_a_result():
    answer = run("--budget", "590")
    options = gpu.parse(["--tiny"])
    names = [name for stage in gpu_cases.stages(options) for case in stage.cases for name in case.names]
    cases = {row["case"]: row for row in answer["results"]}
    assert list(cases) == names and len(set(names)) == len(names)
    for row in cases.values():
        assert row.get("value", 0) > 0, row
        is_share = row["unit"] and "beside" not in row["case"]
        assert not is_share or row["of_measured"] > 0, row
    assert {"train 4x64, 8 tenants", "decode 4 at 32, 8 adapters / none", "optim_step"} < set(names)
    assert answer["card"]["flops"] > 0 and answer["card"]["bytes"] > 0
    assert all(0 <= found["forward"] < 0.02 for found in answer["kernels"].values()) and answer["kernels"]


def test_when_the_time_is_over_it_says_what_it_did_not_reach():
    answer = run("--budget", "0")
    assert {row["skipped"] for row in answer["results"]} == {"not reached in time"}


@pytest.fixture(scope="module")
def session() -> gpu_cases.Session:
    """An engine as an H100 would have it, of descriptions."""
    device = jax.devices()[0]
    config = EngineConfig(max_lora_rank=32, sample_max_num_sequences=128)
    planned = memory_plan.plan(from_config(SHAPES["8B"]), config, ACCELERATOR, usable("h100"))
    model: Any = from_config(SHAPES["8B"] | {"num_hidden_layers": 2})
    sharding = jax.sharding.SingleDeviceSharding(device)
    described = {w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16, sharding=sharding) for w in model.weights}
    how: Any = {"on": ACCELERATOR, "planned": planned, "kernels": ALL_KERNELS, "allocate": described_on(device)}
    engine = JaxEngine(model, tree_of(described), config, Path("/nowhere"), Store("memory:///gpu"), **how)
    driver, holder = Driver(engine), SimpleNamespace(decoder=model)
    return gpu_cases.Session(holder, driver, Rollouts(holder, driver, CARD, 1.0), CARD, 1.0)  # type: ignore[arg-type]


def test_an_h100_has_every_program_that_a_case_names(session):
    known = {program.name for program in session.driver.engine.programs}
    named = {
        name for stage in gpu_cases.stages(gpu.parse([])) for case in stage.cases for name in case.programs(session)
    }
    assert named <= known
    assert {"forward_backward 1x4096 K=1 rank=32", "decode 2 base", "decode 128", "prefill 8"} < named


def test_every_kernel_of_the_engine_is_compared():
    assert {name.split()[0] for name in gpu_kernels.comparisons()} == set(vars(ALL_KERNELS))


def test_eight_tenants_take_turns_row_by_row(session):
    work = micro_batches(session.driver, 4, 512, 8)
    assert [work()[0].slots for _ in range(3)] == [(0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 2, 3)]


def test_a_row_that_the_engine_does_not_offer_is_skipped_with_the_reason(session):
    with pytest.raises(gpu_table.Skipped, match="4x512"):
        micro_batches(session.driver, 3, 512, 1)


@pytest.mark.parametrize(
    ("case", "result", "said"),
    [
        ("train 1x4096, 8 tenants", Result(1, "", 0.47, 0.6), "46%: passed"),
        ("train 1x4096", Result(1, "", None, 0.4), "46%: MISSED"),  # a card without a known peak
        ("decode 128 at 4096", Result(1, "", 0.5, 0.61), "60%: passed"),
        ("decode 1 at 512", Result(1, "", 0.9, 0.74), "75%: MISSED"),
        ("decode 32 at 512, 8 adapters / none", Result(0.84, ""), "85%: MISSED"),
        ("decode 32 at 512, 8 adapters", Result(1, "", 0.1, 0.1), ""),
    ],
)
def test_goals_are_of_the_8b_and_say_whether_they_were_reached(case, result, said):
    assert verdict(goal_of("8B", case), result) == said
    assert verdict(goal_of("0.6B", case), result) == ""


def test_every_goal_is_that_of_a_case():
    names = {name for stage in gpu_cases.stages(gpu.parse([])) for case in stage.cases for name in case.names}
    reached = {goal_of("8B", name) for name in names} - {None}
    assert reached == set(gpu_table.GOALS)


@pytest.mark.parametrize(
    ("name", "flops", "moved"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H100 PCIe", 756e12, 2.0e12),
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12),
        ("cpu", 0.0, 0.0),
    ],
)
def test_a_card_s_peak_is_that_of_its_name(name, flops, moved):
    assert gpu_card.spec_of(name) == (flops, moved)


def test_the_table_is_ready_for_a_page_and_names_what_failed():
    table = Table(["8B"], ["train 1x4096", "optim_step", "prefill 8192"], 100)
    table.card = CARD
    table.run("8B", ["train 1x4096"], 100, lambda: {"train 1x4096": Result(14_000, "tokens/s", 0.5, 0.7)})
    table.run("8B", ["optim_step"], 100, lambda: 1 / 0)
    table.differs("flash_attention", Differences(0.001, 0.5))
    table.differs("paged_prefill", "XlaRuntimeError: no such instruction")
    text = "\n".join(table.markdown())
    assert "NVIDIA H100 80GB HBM3, driver 580.1, JAX 0.12" in text
    assert "| 8B | train 1x4096 | 14,000 tokens/s | 50.0% | 70.0% | 46%: passed |  |" in text
    assert "| 8B | optim_step | – |  |  |  | skipped: ZeroDivisionError" in text
    assert "| 8B | prefill 8192 | – |  |  |  | skipped: not reached in time |" in text
    assert "DIFFERS" in text and "FAILED: XlaRuntimeError: no such instruction" in text


def test_a_command_that_fails_ends_a_measurement_and_nothing_stays_in_flight(session, monkeypatch):
    def execute(command, tensors):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session.driver.engine, "execute", execute)
    work = micro_batches(session.driver, 1, 4096, 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            session.driver.run({"train": work}, lambda answers: True)


def test_what_is_not_compiled_in_time_or_fails_is_told_and_the_others_go_on():
    def program(name, compile):
        return SimpleNamespace(name=name, compile=compile)

    held, told = threading.Event(), []
    programs: Any = [
        program("decode 2", lambda: None),
        program("decode 4", lambda: 1 / 0),
        program("decode 8", held.wait),
        program("decode 16", lambda: None),
    ]
    failed = gpu_compiling.compile_all(programs, 1, 0.2, told.append, [lambda: told.append("beside")])
    held.set()
    assert failed.keys() == {"decode 4", "decode 8", "decode 16"}
    assert "division by zero" in failed["decode 4"] and "not compiled in time" in failed["decode 16"]


def test_a_ratio_without_the_other_rate_says_so():
    table = Table(["8B"], ["decode 32 at 512, 8 adapters", "decode 32 at 512, 8 adapters / none"], 100)
    names = [case for _, case in table.rows]
    table.run("8B", names, 100, lambda: {names[0]: Result(1, "tokens/s")})
    assert table.rows["8B", names[1]] == "there is nothing to compare with"


def test_where_jax_finds_no_gpu_it_says_so_at_once():
    gpu.check_device(gpu.parse(["--tiny"]))
    with pytest.raises(SystemExit, match="no accelerator"):
        gpu.check_device(gpu.parse([]))


def test_rates_count_from_the_moment_when_every_kind_has_answered():
    """What waited for a program before it, or for its first turn, is no part of a rate."""
    answers = [Answer("train", 100, 1.0, None), Answer("sample", 8, 3.0, None), Answer("train", 100, 4.0, None)]
    answers.append(Answer("sample", 8, 5.0, None))
    assert rates(answers, ["train", "sample"]) == {"train": 50.0, "sample": 4.0}
    assert rates(answers[::2], ["train"])["train"] == pytest.approx(100 / 3)


def test_a_measurement_ends_with_the_last_quantum_that_has_room():
    goes_on = for_seconds(3600, ["sample"], {"sample": 2})
    answers = [Answer("sample", 8, time.perf_counter(), None)]
    assert goes_on([]) and goes_on(answers) and not goes_on(answers * 2)
