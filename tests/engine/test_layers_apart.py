"""The accelerator's ways, run on a CPU: layers as a list, grouped adapters and fixed passes change no result, alone or
on a mesh."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from msgspec.structs import replace as replace_fields

from tests.engine.test_windows import MIXED
from tests.support import xla
from tx_async.engine.engine import JaxEngine
from tx_async.engine.kernels import NO_KERNELS, Kernels
from tx_async.engine.platform import CPU
from tx_async.models.load import load_model
from tx_async.storage.store import Store
from tx_async.testing.engine_bench import EngineBench, segment
from tx_async.testing.models import make_model
from tx_async.wire.worker import (
    AdmitSequences,
    EngineConfig,
    LoadSampler,
    SampleQuantum,
    SaveAdapter,
    SequenceSpec,
)

OTHER = replace(
    CPU, layers_apart=True, joins_lora=False, copies_weights=False, grouped_lora=True, fixed_passes=True, overlaps=False
)
CONFIG = EngineConfig(
    max_lora_rank=4,
    max_lora_adapters=2,
    max_sampler_adapters=2,
    train_row_lengths=(32,),
    max_context_length=64,
    sample_max_num_sequences=4,
    kv_cache_tokens=256,
)


def run(on, folder: Path, base: Path, mesh: Mesh | None = None, kernels: Kernels = NO_KERNELS) -> tuple:
    """One training step, and then samples of the base and of the adapter with every kind of limit."""
    model, params = load_model(folder, mesh=mesh)
    engine_config = replace_fields(CONFIG, fully_sharded_data_parallel_size=mesh.shape["fsdp"] if mesh else 1)
    bench = EngineBench(JaxEngine(model, params, engine_config, folder, Store(str(base)), on=on, kernels=kernels))
    config = bench.create(0)
    logprobs, _ = bench.train((0, [segment(20, 1), segment(10, 2)]))
    gradients = jax.tree.leaves(bench.state(0).gradients)
    bench.step(0, learning_rate=0.1)
    bench.run(SaveAdapter(slot=0, key="weights/s", kind="sampler", config=config))
    bench.run(LoadSampler(sampler_slot=1, key="weights/s"))
    limits: tuple[dict[str, Any], ...] = ({}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0.0})
    sequences = tuple(
        SequenceSpec(
            sequence_id=i,
            sampler_slot=1 if i % 2 else -1,
            adapter_version="s" if i % 2 else "base",
            prompt_index=0,
            max_tokens=4,
            seed=i,
            **limit,
        )
        for i, limit in enumerate(limits)
    )
    bench.run(AdmitSequences(sequences=sequences), [np.arange(7, dtype=np.int32)])
    tokens: dict[int, list[int]] = {}
    for _ in range(4):
        reply, tensors = bench.run(SampleQuantum(decode_steps=4, prefill_tokens=256))
        tokens |= {one.sequence_id: tensors[one.tokens_index].tolist() for one in reply.finished}
    bench.engine.close()
    return logprobs, gradients, tokens


SCRIPT = Path(__file__).with_name("accelerator_on_two_devices.py")
WAYS = ("alone", "tensor", "fsdp")
"""On one device, and on a mesh of two along one of its axes."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Layers with a window beside one that sees everything: three page tables."""
    return make_model(tmp_path_factory.mktemp("mixed"), MIXED | {"sliding_window": 5}, tokenizer=False)


@pytest.fixture(scope="module")
def plain(mixed, tmp_path_factory):
    return run(CPU, mixed, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def on_mesh(mixed, tmp_path_factory) -> dict[str, Any]:
    """What a process of two devices found, with kernels: heads and features cut in two, and rows and weights."""
    folder = tmp_path_factory.mktemp("mesh")
    command = [sys.executable, str(SCRIPT), str(mixed), str(folder)]
    environ = os.environ | xla.flags(2) | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "found.npz") as found:
        arrays = dict(found)
    return arrays | json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=WAYS)
def other(request, mixed, tmp_path_factory):
    if request.param == "alone":
        return run(OTHER, mixed, tmp_path_factory.mktemp("base"))
    found = request.getfixturevalue("on_mesh")
    way = request.param
    gradients = [found[f"{way} gradient {i}"] for i in range(found["num_gradients"])]
    return found[f"{way} logprobs"], gradients, {int(name): tokens for name, tokens in found["tokens"][way].items()}


def test_training_gives_the_same_losses_and_gradients(plain, other):
    (logprobs, gradients, _), (others, other_gradients, _) = plain, other
    np.testing.assert_allclose(others, logprobs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(other_gradients, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_sampling_draws_the_same_tokens_with_and_without_an_adapter(plain, other):
    tokens, others = plain[2], other[2]
    assert set(tokens) == {0, 1, 2, 3}
    assert others == tokens


def test_on_a_mesh_kernels_over_pages_run_for_the_heads_of_a_device(on_mesh):
    assert on_mesh["heads_of_kernels"] == [["decode", 2, 1], ["prefill", 2, 1]], "of two key heads"


def test_of_latents_each_device_computes_its_query_heads(on_mesh):
    np.testing.assert_allclose(on_mesh["latents on a mesh"], on_mesh["latents"], rtol=1e-6, atol=1e-7)


def test_training_attention_on_a_mesh_is_that_of_one_device(on_mesh):
    for name in ("out", "dq", "dk", "dv"):
        np.testing.assert_array_equal(on_mesh[f"flash {name} on a mesh"], on_mesh[f"flash {name}"])
