"""What memory is for: counted where it can be, bounded where it must be, refused with the setting to change."""

import json
from dataclasses import replace
from typing import Any

import jax
import pytest

from tx_async.config import ServerConfig
from tx_async.doctor import run_plan
from tx_async.engine import adapter_slots, memory_plan
from tx_async.engine.devices import GPU_BYTES, usable
from tx_async.engine.kernels import NO_KERNELS
from tx_async.engine.memory_plan import GIB, MemoryPlan, lora_rank_limit, with_slots_for
from tx_async.engine.platform import ACCELERATOR, CPU, available_memory
from tx_async.engine.temporaries import Temporaries
from tx_async.layers.residuals import NOTHING
from tx_async.models.load import from_config
from tx_async.testing.models import (
    DEEPSEEK_V3_TINY,
    GPT_OSS_TINY,
    QWEN3_5_MOE_TINY,
    QWEN3_5_TINY,
    QWEN3_MOE_TINY,
    QWEN3_TINY,
)
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
_QWEN3_5 = {
    "vocab_size": 248_320,
    "layer_types": None,
    "num_attention_heads": 16,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262_144,
}
QWEN3_5_9B = (
    QWEN3_5_TINY
    | _QWEN3_5
    | {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
    }
)
QWEN3_5_35B_A3B = (
    QWEN3_5_MOE_TINY
    | _QWEN3_5
    | {
        "hidden_size": 2048,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
    }
)
LATENT = DEEPSEEK_V3_TINY | {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "first_k_dense_replace": 2,
    "num_attention_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
GEMMA_3_4B = QWEN3_TINY | {
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262_208,
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
}
LLAMA_70B = QWEN3_8B | {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "max_position_embeddings": 131_072,
}
GPT_OSS_20B = GPT_OSS_TINY | {
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 131_072,
    "rope_scaling": GPT_OSS_TINY["rope_scaling"] | {"factor": 32.0, "original_max_position_embeddings": 4096},
}
MEASURED = {(4, 1024): 15.85, (1, 4096): 13.4, (1, 16384): 50.1, (128, 32): 97.9}
"""GiB of temporaries of forward_backward that keeps, Qwen3-8B, rank 32, compiled for an H100 by JAX 0.12.0.1."""
MEASURED_AGAIN = {(1, 16_384, 1): 6.67, (1, 40_960, 6): 7.23}
"""The same where so many layers together are computed again; of two layers, and what each further one adds, and of all
of them."""
MEASURED_IN_PART = {(4, 512, 20): 6.16, (2, 1024, 29): 6.74, (1, 2048, 33): 6.95}
MEASURED_IN_PART |= {(1, 4096, 13): 6.52, (1, 8192, 3): 5.84}
"""The same of all layers, of which so many keep: the last ones."""
MEASURED_EXPERTS = {(4, 512, 0): 1472, (1, 4096, 2): 1675, (1, 16_384, 0): 2447}
"""MiB of temporaries of two layers of Qwen3-30B-A3B with the experts over eight devices, where so many keep."""
MEASURED_VOCABULARY = 2544
"""MiB of two layers of Gemma-3-4B that keep, 4 x 512: most of it the head's, of 262,208 tokens."""
MEASURED_MIXERS = {"gpt-oss": (4096, 1715), "latent": (4096, 1207), "hybrid": (16_384, 4394)}
"""Tokens of a row, and MiB that it takes where layers are computed again: two with windows and sinks, two with heads of
192 and 128, eight of which six are recurrent."""
MEASURED_SAMPLING = {"decode 128 wide": 764, "prefill 8": 156}
"""MiB of temporaries, and of what a decode step tells of the most candidates."""
MEASURED_WIDE = 192
"""MiB that a batch of 4,096 tokens and its results take more with 4,097 targets for each token than with one; its
temporaries take no more."""


def plan(config: dict[str, Any], device: str = "h100", **engine: Any) -> MemoryPlan:
    """The plan of a start, with slots of rank 32 unless `max_lora_rank` says otherwise."""
    asked = engine.get("max_lora_rank", 0)
    return memory_plan.plan(
        from_config(config), with_slots_for(EngineConfig(**engine), asked), ACCELERATOR, usable(device)
    )


def bounds(config: dict[str, Any] = QWEN3_8B, **engine: Any) -> Temporaries:
    """With slots of rank 32."""
    return memory_plan.temporaries_of(from_config(config), with_slots_for(EngineConfig(**engine)), ACCELERATOR)


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
def test_the_bound_on_temporaries_holds_against_compiled_programs(shape: tuple[int, int]):
    bound = bounds().of_training(*shape, NOTHING) / GIB
    assert MEASURED[shape] <= bound <= 1.25 * MEASURED[shape]


@pytest.mark.parametrize("shape", MEASURED_AGAIN)
def test_the_bound_holds_where_layers_are_computed_again(shape: tuple[int, int, int]):
    rows, length, layers = shape
    (way,) = (way for way in bounds().ways if way.layers == layers)
    bound = bounds().of_training(rows, length, way) / GIB
    assert MEASURED_AGAIN[shape] <= bound <= 1.25 * MEASURED_AGAIN[shape]


@pytest.mark.parametrize("shape", MEASURED_IN_PART)
def test_the_bound_holds_where_some_layers_keep(shape: tuple[int, int, int]):
    rows, length, keeping = shape
    bound = bounds().of_training(rows, length, bounds().ways[1]._replace(keeping=keeping)) / GIB
    assert MEASURED_IN_PART[shape] <= bound <= 1.4 * MEASURED_IN_PART[shape]


@pytest.mark.parametrize("shape", MEASURED_EXPERTS)
def test_the_bound_holds_where_each_device_has_room_for_the_tokens_of_all_experts(shape: tuple[int, int, int]):
    rows, length, keeping = shape
    of_two = bounds(QWEN3_30B_A3B | {"num_hidden_layers": 2}, expert_parallel_size=8)
    bound = of_two.of_training(rows, length, of_two.ways[1]._replace(keeping=keeping)) / 2**20
    assert MEASURED_EXPERTS[shape] <= bound <= 1.6 * MEASURED_EXPERTS[shape]


def test_the_bound_holds_for_a_large_vocabulary():
    of_two = bounds(GEMMA_3_4B | {"num_hidden_layers": 2})
    bound = of_two.of_training(4, 512, of_two.ways[1]._replace(keeping=2)) / 2**20
    assert MEASURED_VOCABULARY <= bound <= 1.25 * MEASURED_VOCABULARY


@pytest.mark.parametrize("name", MEASURED_MIXERS)
def test_the_bound_holds_for_mixers_of_every_kind(name: str):
    """The kernel of attention writes scores nowhere; the plain version needs more."""
    shapes, layers = {"gpt-oss": (GPT_OSS_20B, 2), "latent": (LATENT, 2), "hybrid": (QWEN3_5_9B, 8)}[name]
    mine, (length, measured) = bounds(shapes | {"num_hidden_layers": layers}), MEASURED_MIXERS[name]
    bound = mine.of_training(1, length, mine.ways[1]) / 2**20
    assert measured <= bound <= 1.5 * measured
    plain = replace(mine, kernels=replace(mine.kernels, flash_attention=False))
    assert name == "hybrid" or plain.of_training(1, length, mine.ways[1]) / 2**20 > bound


def test_the_bound_on_sampling_holds_against_compiled_programs():
    most = max(MEASURED_SAMPLING.values())
    assert most <= bounds().of_sampling / 2**20 <= 1.25 * most
    gathering = replace(bounds(), kernels=NO_KERNELS)
    assert gathering.of_sampling > bounds().of_sampling, "no kernel reads pages in place"


def test_many_targets_for_each_token_are_counted():
    assert MEASURED_WIDE <= bounds().of_wide_targets(1, 4096) / 2**20 <= 2 * MEASURED_WIDE
    few = bounds()
    for shape in plan(QWEN3_8B).row_shapes:
        size = shape.rows, shape.length
        assert shape.temporaries == few.of_training(*size, shape.recompute) + few.of_wide_targets(*size)


def test_every_row_of_qwen3_8b_needs_at_most_8_gib_beside_its_batch():
    for shape in plan(QWEN3_8B).row_shapes:
        assert bounds().of_training(shape.rows, shape.length, shape.recompute) <= 8 * GIB


def test_a_row_that_would_keep_too_much_recomputes_and_one_that_never_fits_is_not_offered():
    made = plan(QWEN3_8B)
    kept = {shape.length: shape.recompute.keeping for shape in made.row_shapes if shape.recompute.layers == 1}
    assert kept == {512: 19, 1024: 27, 2048: 32, 4096: 13, 8192: 3, 16_384: 0}
    assert {shape.length for shape in made.row_shapes if shape.recompute.layers == 6} == {32_768, 40_960}
    assert any("1x4096 recomputing all but 13 layers" in line for line in made.lines())
    small = plan(QWEN3_8B, "l40s")
    assert not small.fits or small.row_shapes[-1].length < 40_960


def test_short_rows_may_take_what_the_longest_needs_in_any_case():
    """Of Llama-70B on eight a row of 32,768 tokens takes 13 GiB however much it computes again: so do others, rather
    than compute again what would fit."""
    mine, made = bounds(LLAMA_70B, tensor_parallel_size=8), plan(LLAMA_70B, tensor_parallel_size=8)
    few = [mine.of_training(shape.rows, shape.length, shape.recompute) for shape in made.row_shapes]
    assert few[-1] == max(few) > usable("h100") / memory_plan.ACTIVATIONS_SHARE
    assert max(shape.temporaries for shape in made.row_shapes) == made.row_shapes[-1].temporaries
    assert next(shape.recompute for shape in made.row_shapes if shape.length == 2048) == NOTHING
    kept = {shape.length: shape.recompute.keeping for shape in made.row_shapes}
    assert kept[1024] > 60 and kept[512] > 40 and kept[4096] > 20, "of 80 layers"


def test_what_the_cache_does_not_want_is_for_activations():
    """Qwen3-8B on eight devices: the cache has room for every sequence's whole context."""
    made = plan(QWEN3_8B, tensor_parallel_size=8)
    assert made.kv_cache_tokens == EngineConfig().sample_max_num_sequences * made.context
    kept = {shape.length: shape.recompute for shape in made.row_shapes}
    assert kept[8192] == NOTHING and kept[16_384].keeping > 20
    few_tokens = plan(QWEN3_8B, kv_cache_tokens=65_536)
    assert few_tokens.kv_cache_tokens == 65_536 and few_tokens.row_shapes[3].recompute == NOTHING


def test_more_memory_for_activations_is_less_to_compute_again():
    roomy = plan(QWEN3_8B, activation_memory_gib=16)
    kept = {shape.length: shape.recompute for shape in roomy.row_shapes}
    assert all(kept[length] == NOTHING for length in (512, 1024, 2048, 4096)) and kept[8192].keeping > 10
    assert roomy.kv_cache_tokens < plan(QWEN3_8B).kv_cache_tokens
    all_again = plan(QWEN3_8B, gradient_checkpointing=True)
    assert all(shape.recompute.layers and not shape.recompute.keeping for shape in all_again.row_shapes)


def test_along_fsdp_training_slots_are_cut_whatever_their_weights_are_and_what_is_gathered_is_counted():
    alone, cut = plan(QWEN3_8B), plan(QWEN3_8B, fully_sharded_data_parallel_size=8)
    assert sizes(cut)["training slots"] == sizes(alone)["training slots"] / 8
    assert sizes(cut)["samplers"] > sizes(alone)["samplers"] / 8, "cut as their weights are"
    head, layer = 151_936 * 4096, 4096 * (2 * 4096 + 2 * 1024 + 3 * 12_288)
    assert sizes(cut)["gathered"] == 2 * (head + 2 * layer) / GIB and "gathered" not in sizes(alone)
    assert [(shape.rows, shape.length) for shape in cut.row_shapes[:4]] == [(32, 512), (16, 1024), (8, 2048), (8, 4096)]


def test_experts_are_cut_over_eight_devices():
    alone, cut = plan(QWEN3_30B_A3B), plan(QWEN3_30B_A3B, expert_parallel_size=8)
    # On two devices one adapter's optimizer state, on its way to a file, takes 14 GiB of each.
    assert not alone.fits and "expert_parallel_size to 4" in alone.problem
    assert cut.fits and sizes(cut)["weights"] < 10


def test_a_checkpoint_leaves_its_slot_in_pieces():
    """Four arrays of what a slot holds. Every host has all of it: an axis that reaches over hosts cuts nothing."""
    here = plan(QWEN3_30B_A3B, expert_parallel_size=8)
    of_slot = sizes(here)["training slots"] / 9
    assert sizes(here)["checkpoint"] == pytest.approx(of_slot, rel=1e-3)
    on_two_hosts = plan(QWEN3_8B, fully_sharded_data_parallel_size=2, tensor_parallel_size=8, num_processes=2)
    assert sizes(on_two_hosts)["checkpoint"] == pytest.approx(2 * sizes(on_two_hosts)["training slots"] / 9, rel=0.01)


@pytest.mark.parametrize(
    ("config", "setting"),
    [("QWEN3_5_35B_A3B", "expert_parallel_size"), ("LLAMA_70B", "tensor_parallel_size")],
)
def test_doctor_names_the_setting_that_uses_the_devices_and_it_fits(config, setting, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(globals()[config]))

    def doctor(**engine: Any) -> tuple[int, str]:
        backend = EngineConfig(**engine)
        code = run_plan(ServerConfig(base_model=str(tmp_path), backend_config=backend), "h100", 8)
        return code, capsys.readouterr().out

    code, said = doctor()
    assert code == 2 and f"Set {setting} to 8 in backend_config, on the 8 devices." in said
    assert "idle" not in said, "one line says what to set"
    code, said = doctor(**{setting: 8})
    assert code == 0 and "8 × 79.1 GiB" in said and "does not fit" not in said.splitlines()[-1]


def test_what_does_not_fit_names_the_setting():
    assert "tensor_parallel_size to 2" in plan(QWEN3_8B | {"num_hidden_layers": 180}).problem
    assert "max_context_length" in plan(QWEN3_8B, "l40s", max_context_length=40_960, max_lora_rank=128).problem
    assert "kv_cache_tokens" in plan(QWEN3_8B, kv_cache_tokens=10**7).problem


def test_a_context_that_does_not_fit_is_served_as_far_as_it_does():
    made = plan(QWEN3_8B | {"max_position_embeddings": 1_048_576}, max_lora_adapters=2)
    assert made.fits and 40_960 < made.context < 1_048_576
    assert any("of 1048576: more does not fit" in line for line in made.lines())
    assert made.row_shapes[-1].length < made.wanted_context


def test_a_hybrid_starts_by_default_and_its_states_are_counted():
    made = plan(QWEN3_5_9B)
    assert made.fits and (made.num_training_slots, made.num_sampler_slots) == (8, 8) and made.context > 200_000
    assert sizes(made)["recurrent state"] == pytest.approx(129 * 49.1 / 1024, rel=0.01), "64 sequences, 64 snapshots"


def test_slots_give_way_where_adapters_of_experts_are_large():
    made = plan(GPT_OSS_20B)
    assert made.fits and 1 <= made.num_training_slots < 8 and made.context >= 8192 <= made.longest_row
    assert any(line.startswith(f"slots for {made.num_training_slots} adapter") for line in made.lines())
    assert plan(GPT_OSS_20B, max_lora_adapters=1).num_training_slots == 1


def test_layers_with_a_window_leave_room_for_a_longer_context():
    """Half of gpt-oss's layers see 128 tokens: what they would keep of the rest holds the others' keys and values."""
    mixed = plan(GPT_OSS_20B, max_lora_adapters=2, max_sampler_adapters=2)
    assert mixed.context > 1.9 * mixed.kv_cache_tokens < mixed.wanted_context
    assert any("1 of the whole context: 12 of 24 layers keep a window" in line for line in mixed.lines())
    assert not any("window" in line for line in plan(QWEN3_8B).lines())


def test_the_states_of_a_hybrid_are_cut_with_its_heads():
    alone, cut = plan(QWEN3_5_35B_A3B), plan(QWEN3_5_35B_A3B, expert_parallel_size=8)
    assert not alone.fits and "Set expert_parallel_size to" in alone.problem
    assert cut.fits and cut.longest_row >= 8192
    whole, by_heads = sizes(cut), sizes(plan(QWEN3_5_35B_A3B, tensor_parallel_size=8, max_lora_adapters=1))
    assert by_heads["recurrent state"] < whole["recurrent state"] / 4, "the convolution's part is whole"


def test_a_row_recomputes_rather_than_not_be_offered():
    lengths = [shape.length for shape in plan(QWEN3_5_35B_A3B, expert_parallel_size=8).row_shapes]
    assert lengths[-1] == lengths[0] * 2 ** (len(lengths) - 1), "no gaps"


def test_wider_slots_are_offered_as_far_as_a_plan_with_them_fits():
    """Slots are fewer then; where no number of them fits, the limit stays below `max_lora_rank`."""
    model, config = from_config(QWEN3_8B), EngineConfig()
    assert lora_rank_limit(model, config, ACCELERATOR, usable("h100")) == 128
    assert plan(QWEN3_8B, max_lora_rank=128).num_training_slots < config.max_lora_adapters
    small = 2 * GIB + int(plan(QWEN3_8B).parts[0].num_bytes)
    narrow, asked = (
        EngineConfig(max_lora_rank=1024),
        lora_rank_limit(model, EngineConfig(max_lora_rank=1024), ACCELERATOR, small),
    )
    assert 32 <= asked < narrow.max_lora_rank


def test_where_no_memory_is_planned_slots_take_at_most_half_of_what_is_left():
    """A rank that somebody asks for must not have the system end the worker, again and again."""
    model = from_config(QWEN3_8B)
    limits = [lora_rank_limit(model, EngineConfig(), CPU, 0, left * GIB) for left in (0, 1, 32, 64, 512)]
    assert limits == [128, 32, 32, 64, 128]
    assert lora_rank_limit(model, EngineConfig(max_lora_adapters=1, max_sampler_adapters=1), CPU, 0, 32 * GIB) == 128
    assert available_memory() > 0
