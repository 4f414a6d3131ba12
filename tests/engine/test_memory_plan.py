"""What memory is for: counted where it can be, bounded where it must be, refused with the setting to change."""

from typing import Any

import jax
import pytest

from tx_async.engine import adapter_slots, memory_plan
from tx_async.engine.devices import GPU_BYTES, usable
from tx_async.engine.memory_plan import GIB, MemoryPlan
from tx_async.engine.platform import ACCELERATOR
from tx_async.models.load import from_config
from tx_async.testing.models import QWEN3_MOE_TINY, QWEN3_TINY
from tx_async.wire.worker import EngineConfig

QWEN3_8B = QWEN3_TINY | {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
QWEN3_30B_A3B = QWEN3_MOE_TINY | {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 40_960,
}
MEASURED = {(4, 1024): 15.85, (1, 4096): 13.4, (1, 16384): 50.1, (128, 32): 97.9}
"""GiB of temporaries of forward_backward that keeps, Qwen3-8B, rank 32, compiled for an H100 by JAX 0.12.0.1."""


def plan(config: dict[str, Any], device: str = "h100", **engine: Any) -> MemoryPlan:
    return memory_plan.plan(from_config(config), EngineConfig(**engine), ACCELERATOR, usable(device))


def sizes(made: MemoryPlan) -> dict[str, float]:
    return {part.name: part.num_bytes / GIB for part in made.parts}


def test_a_default_start_of_qwen3_8b_fits_on_80_gb():
    made = plan(QWEN3_8B)
    assert made.fits and made.context == 40_960 and made.row_shapes[-1].length == 40_960
    parts = sizes(made)
    assert parts["weights"] == pytest.approx(15.26, abs=0.01)
    assert parts["training slots"] == pytest.approx(12.38, abs=0.01)
    assert sum(parts.values()) * GIB <= usable("h100") < GPU_BYTES["h100"]
    assert made.kv_cache_tokens >= made.context


def test_slots_take_what_the_engine_makes_of_them():
    model, config = from_config(QWEN3_TINY), EngineConfig(max_lora_adapters=3, max_sampler_adapters=5, max_lora_rank=16)
    made = memory_plan.plan(model, config, ACCELERATOR, 2 * GIB)
    state = jax.eval_shape(lambda: adapter_slots.zeros(model.lora_targets(), 4, 16)._replace(step=None))
    taken = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert {part.name: part.num_bytes for part in made.parts}["training slots"] == taken
    samplers = jax.eval_shape(lambda: adapter_slots._sampler_zeros(model.lora_targets(), 5, 16, "bfloat16"))
    assert made.parts[2].num_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(samplers))


@pytest.mark.parametrize("shape", MEASURED)
def test_the_bound_on_temporaries_holds_against_compiled_programs(shape):
    planner = memory_plan._Planner(from_config(QWEN3_8B), EngineConfig(), ACCELERATOR, usable("h100"))
    bound = planner._train_temporaries(*shape, recomputes=False) / GIB
    assert MEASURED[shape] <= bound <= 1.25 * MEASURED[shape]


def test_a_row_that_would_keep_too_much_recomputes_and_one_that_never_fits_is_not_offered():
    made = plan(QWEN3_8B)
    assert {shape.length: shape.recomputes for shape in made.row_shapes}[40_960]
    assert not {shape.length: shape.recomputes for shape in made.row_shapes}[4096]
    small = plan(QWEN3_8B, "l40s")
    assert not small.fits or small.row_shapes[-1].length < 40_960


def test_experts_are_cut_over_eight_devices():
    alone, cut = plan(QWEN3_30B_A3B), plan(QWEN3_30B_A3B, expert_parallel_size=8)
    assert not alone.fits and "expert_parallel_size to 8" in alone.problem
    assert cut.fits and sizes(cut)["weights"] < 10


def test_what_does_not_fit_names_the_setting():
    assert "tensor_parallel_size to 4" in plan(QWEN3_8B | {"num_hidden_layers": 144}).problem
    assert "max_context_length" in plan(QWEN3_8B, "l40s", max_context_length=40_960, max_lora_adapters=4).problem
    assert "kv_cache_tokens" in plan(QWEN3_8B, kv_cache_tokens=10**7).problem


def test_a_context_that_does_not_fit_is_served_as_far_as_it_does():
    made = plan(QWEN3_8B | {"max_position_embeddings": 1_048_576}, max_lora_adapters=2)
    assert made.fits and 40_960 < made.context < 1_048_576
    assert any("of 1048576: more does not fit" in line for line in made.lines())
    assert made.row_shapes[-1].length < made.wanted_context
