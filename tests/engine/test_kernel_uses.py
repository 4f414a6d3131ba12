"""What is said of a model's kernels is what a trace of its layers meets."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from tx_async.engine import paged_kernel, prefill_kernel
from tx_async.engine.kernel_uses import NOT_HERE, uses
from tx_async.engine.kernels import ALL_KERNELS, NO_KERNELS, PLAIN
from tx_async.engine.kv_cache import CacheLayout
from tx_async.engine.paged_attention import DecodeAttention, PagedAttention, TileStates
from tx_async.engine.platform import ACCELERATOR
from tx_async.layers import flash_attention, grouped_kernel
from tx_async.layers.attention import PackedAttention
from tx_async.layers.lora import LoraRows
from tx_async.layers.sharding import AXES
from tx_async.models.decoder import tree_of
from tx_async.models.load import from_config
from tx_async.testing.models import (
    DEEPSEEK_V3_TINY,
    GPT_OSS_TINY,
    QWEN3_5_TINY,
    QWEN3_MOE_TINY,
    QWEN3_TINY,
)
from tx_async.wire.worker import EngineConfig

CONFIG = EngineConfig()
WIDE_MOE = QWEN3_MOE_TINY | {"hidden_size": 64, "moe_intermediate_size": 64}
LATENT = DEEPSEEK_V3_TINY | {"qk_rope_head_dim": 16}
MODELS = {
    "qwen3": QWEN3_TINY,
    "heads of 24": QWEN3_TINY | {"head_dim": 24},
    "experts": WIDE_MOE,
    "narrow experts": QWEN3_MOE_TINY | {"moe_intermediate_size": 24},
    "windows and sinks": GPT_OSS_TINY,
    "latent": LATENT,
    "narrow latent": DEEPSEEK_V3_TINY,
    "hybrid": QWEN3_5_TINY,
}


@pytest.mark.parametrize("name", MODELS)
def test_what_runs_is_what_a_trace_meets(name, monkeypatch):
    model = from_config(MODELS[name])
    met: set[str] = set()

    def noted(task: str, function: Any) -> Any:
        def run(*inputs: Any, **options: Any) -> Any:
            met.add(task)
            return function(*inputs, **options)

        return run

    for task, module, function in (
        ("training attention", flash_attention, "flash_attention"),
        ("decode attention", paged_kernel, "attend"),
        ("prefill attention", prefill_kernel, "attend"),
        ("experts", grouped_kernel, "experts_mlp"),
    ):
        monkeypatch.setattr(module, function, noted(task, getattr(module, function)))
    trace(model)
    said = uses(ALL_KERNELS, model, CONFIG, ACCELERATOR)
    assert {use.task for use in said if use.runs != PLAIN} == met
    assert all(use.plain for use in said if use.runs == PLAIN)


def trace(model: Any) -> None:
    """The layers of a training row, of a prefill and of a decode step."""
    kinds = {True: jnp.float32, False: jnp.bfloat16}
    params = tree_of({weight: jax.ShapeDtypeStruct(weight.shape, kinds[weight.wide]) for weight in model.weights})
    layout = CacheLayout.plan(1024, CONFIG.kv_page_size, 512, ACCELERATOR)
    layout = replace(layout, num_slots=4 if model.state_layers else 0)
    pools = jax.eval_shape(lambda: layout.new_pools(model, jnp.bfloat16))
    tile = CONFIG.kv_page_size if model.state_layers else ACCELERATOR.prefill_tile_tokens
    tables, alive, slots = jnp.zeros((2, layout.table_pages), jnp.int32), jnp.ones(2, bool), jnp.zeros(2, jnp.int32)

    def run(attend: Any, length: int, cache: Any) -> None:
        tokens = jnp.zeros((2, length), jnp.int32)
        lora = LoraRows({}, jnp.ones(2))

        def forward(params: Any, cache: Any) -> Any:
            return model.forward(params, lora, tokens, tokens, attend(tokens), cache, grouped_kernel=True)

        jax.eval_shape(forward, params, cache)

    states = TileStates(slots, slots, slots, slots, alive)
    run(lambda positions: PackedAttention(positions, positions + 1, flash=True), 64, ())
    run(lambda positions: PagedAttention(layout, tables, positions, alive, states, True), tile, pools)
    run(lambda positions: DecodeAttention(layout, tables, positions, alive, slots, True), 1, pools)


def test_reasons_name_the_shape_that_is_none_of_a_kernels():
    of = lambda config, **engine: {  # noqa: E731
        use.task: use.plain for use in uses(ALL_KERNELS, from_config(config), EngineConfig(**engine), ACCELERATOR)
    }
    assert of(QWEN3_TINY) == dict.fromkeys(("training attention", "decode attention", "prefill attention"), "")
    assert of(QWEN3_TINY | {"head_dim": 24})["decode attention"] == "heads of 24 features"
    assert of(DEEPSEEK_V3_TINY)["decode attention"] == "latents of 32 + 8 features"
    assert of(LATENT)["decode attention"] == of(LATENT)["prefill attention"] == ""
    assert of(DEEPSEEK_V3_TINY)["training attention"] == "heads of 24 features"
    assert of(GPT_OSS_TINY)["training attention"] == of(GPT_OSS_TINY)["decode attention"] == ""
    assert set(of(QWEN3_TINY, dtype="float32").values()) == {"in float32"}


@pytest.mark.parametrize(
    ("mesh", "plain"),
    [
        ((1, 4, 1), ""),
        ((2, 2, 2), ""),
        ((1, 2, 4), ""),
        ((1, 2, 16), "64 × 8 features on each of 16 devices in bfloat16"),
        ((1, 1, 3), ""),
    ],
)
def test_experts_run_in_their_kernels_on_a_mesh_whose_devices_have_features_enough(mesh, plain):
    """Three devices do not divide 128 features: each has all of them."""
    model = from_config(WIDE_MOE | {"moe_intermediate_size": 128})
    said = uses(ALL_KERNELS, model, CONFIG, ACCELERATOR, AbstractMesh(mesh, AXES))[-1]
    assert (said.task, said.plain) == ("experts", plain) and (said.runs == PLAIN) == bool(plain)


def test_a_kernel_that_does_not_run_on_the_device_runs_for_no_model():
    said = uses(NO_KERNELS, from_config(QWEN3_TINY), CONFIG, ACCELERATOR)
    assert {(use.runs, use.plain) for use in said} == {(PLAIN, NOT_HERE)}
