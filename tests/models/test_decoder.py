"""What all families promise besides the right logits: the cache, recomputation, isolation of rows, bf16."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import parity
from tests.support.parity import Case
from tx_async.layers.attention import PackedAttention
from tx_async.layers.lora import LoraActive, LoraRows, layer_slice, tiles
from tx_async.layers.residuals import NOTHING, Recompute
from tx_async.models.decoder import layers_apart, unembedding
from tx_async.models.load import load_model
from tx_async.testing.models import QWEN3_TINY, make_model, make_qwen3
from tx_async.wire.worker import LORA_ALPHA, AdapterConfig

CONFIG = AdapterConfig(rank=4)
kinds = pytest.mark.parametrize("case", parity.KINDS, ids=lambda case: case.name)


@dataclass
class CachedAttention:
    """An `Attend` over plain caches {window: [layers, R, S, heads, features]}, of the tokens before and at
    `positions`."""

    positions: jax.Array

    def __call__(self, cache, layer, q, k, v, scale, v_features=0, window=0, sinks=None):
        rows = jnp.arange(q.shape[0])[:, None]
        new = {"k": k} | ({} if v is None else {"v": v})
        of = {
            name: cache[name] | {window: cache[name][window].at[layer, rows, self.positions].set(x)}
            for name, x in new.items()
        }
        cache = cache | of
        keys = cache["k"][window][layer]
        values = keys[..., :v_features] if v is None else cache["v"][window][layer]
        keys, values = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (keys, values))
        scores = jnp.einsum("rlhd,rshd->rhls", q, keys) * scale
        seen = jnp.arange(keys.shape[1]) <= self.positions[..., None]
        if window:
            seen &= jnp.arange(keys.shape[1]) > self.positions[..., None] - window
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        if sinks is not None:
            sink = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
            scores = jnp.concatenate([scores, sink], axis=-1)
        weights = jax.nn.softmax(scores)[..., : keys.shape[1]]
        return jnp.einsum("rhls,rshd->rlhd", weights, values), cache

    def recur(self, cache, layer, rule, x):
        """One chunk of any length, from the state [layers, R, ...] that the one before it left."""
        before, state = cache["conv"][layer], cache["state"][layer]
        counts = jnp.full(x.g.shape[0], x.g.shape[1])
        state, out = rule.chunk(x, before, counts)(state)
        after = rule.history(x, before, counts)
        return out, cache | {"conv": cache["conv"].at[layer].set(after), "state": cache["state"].at[layer].set(state)}


@kinds
def test_weights_laid_out_for_decoding_are_the_same_model(case, tmp_path):
    model, params = load_model(make_model(tmp_path, case.config, tokenizer=False))
    tokens, lora = jnp.asarray(parity.tokens_of(case, 0, rows=2)), parity.no_lora(model, 2)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attend = PackedAttention(positions, jnp.ones_like(positions))
    forward = jax.jit(lambda params: model.forward(params, lora, tokens, positions, attend)[0])
    laid_out = model.for_decoding(params)
    assert parity.relative_error(forward(laid_out), forward(params)) < 5e-6
    np.testing.assert_array_equal(laid_out["head"].matrix, unembedding(params))


@kinds
def test_prefill_and_decode_through_the_cache_equal_the_full_forward_with_lora(case, tmp_path):
    """Row 0 has adapter 1, row 1 none, row 2 adapter 0. For latent attention this is the absorbed form."""
    model, params = load_model(make_model(tmp_path, case.config, tokenizer=False))
    tokens = parity.tokens_of(case._replace(length=12), 0, rows=3)
    adapters = [parity.random_adapter(model, CONFIG, seed) for seed in (0, 1)]
    stacked = jax.device_put(jax.tree.map(lambda a, b: np.stack([a, b], axis=1), *adapters))
    scale, rows = jnp.full(2, LORA_ALPHA / CONFIG.rank), jnp.array([1, -1, 0], jnp.int32)
    start, adapter_of_tile, num_tiles = tiles(np.asarray(rows))
    lora = LoraActive(
        slots=stacked,
        scale=scale,
        active=jnp.array([0, 1], jnp.int32),
        num_active=jnp.int32(2),
        tile_start=jnp.asarray(start),
        tile_adapter=jnp.asarray(adapter_of_tile),
        num_tiles=jnp.int32(num_tiles),
        row_adapter=rows,
    )

    @jax.jit
    def step(cache, tokens, positions):
        hidden, cache = model.forward(params, lora, tokens, positions, CachedAttention(positions), cache)
        head = lora.deltas(layer_slice(lora.weights["head"]), ("head",), hidden)[0]
        return hidden @ unembedding(params).T + head, cache

    R, L = tokens.shape
    layers = model.window_layers
    cache = {
        name: {window: np.zeros((count, R, L, *shape), np.float32) for window, count in layers.items()}
        for name, shape in model.cache_shapes.items()
    } | {name: np.zeros((model.state_layers, R, *shape), np.float32) for name, (shape, _) in model.state_shapes.items()}
    positions = np.broadcast_to(np.arange(L, dtype=np.int32), (R, L))
    prefill, cache = step(cache, tokens[:, :9], positions[:, :9])
    decoded = []
    for i in range(9, L):
        logits, cache = step(cache, tokens[:, i : i + 1], positions[:, i : i + 1])
        decoded.append(logits)
    found = np.concatenate([prefill, *decoded], axis=1)
    of_rows = adapters[1], jax.tree.map(np.zeros_like, adapters[0]), adapters[0]
    alone = LoraRows(jax.tree.map(lambda *w: np.stack(w, axis=1), *of_rows), jnp.full(3, LORA_ALPHA / CONFIG.rank))
    full = np.asarray(jax.jit(partial(parity.logits, model))(params, tokens, alone))
    for row in range(3):
        assert parity.relative_error(found[row], full[row]) < 1e-5


@kinds
def test_recomputation_gives_equal_gradients_and_lower_peak_memory(case, tmp_path):
    deep = case.config | {"num_hidden_layers": 8}
    if "layer_types" in deep:
        deep["layer_types"] = list(dict.fromkeys(deep["layer_types"])) * 4  # each kind once in the scan's body
    model, params = load_model(make_model(tmp_path, deep, tokenizer=False))
    tokens = parity.tokens_of(case._replace(length=64), 0, rows=4)
    lora = parity.rows_of(parity.random_adapter(model, CONFIG), CONFIG, 4)
    positions = jnp.broadcast_to(jnp.arange(64), tokens.shape)

    def loss(lora, params, tokens, recompute):
        attend = PackedAttention(positions, jnp.ones_like(positions))
        hidden, _ = model.forward(params, lora, tokens, positions, attend, recompute=recompute)
        return (hidden**2).mean()

    given = lora, params, tokens
    plain, saving = (
        jax.jit(partial(jax.grad(loss), recompute=what)).lower(*given).compile() for what in (NOTHING, Recompute(1))
    )
    equal = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(equal, plain(*given).weights, saving(*given).weights)
    # The delta rule makes its chunks' terms again in any case: there is less left to save.
    share = 0.9 if "linear_attention" in deep.get("layer_types", ()) else 0.8
    assert saving.memory_analysis().temp_size_in_bytes < share * plain.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("apart", [True, False], ids=["list", "scan"])
def test_groups_of_layers_and_blocks_of_tokens_give_equal_gradients(apart, tmp_path):
    """A list in groups of three of its four layers, a scan in groups of two; 50 positions in blocks of 15. Or the last
    layers of a list keep what the others make again."""
    model, params = load_model(make_qwen3(tmp_path, tokenizer=False, num_hidden_layers=4))
    params = layers_apart(params) if apart else params
    case = Case("qwen3", QWEN3_TINY, 50)
    tokens = jnp.asarray(parity.tokens_of(case, 0, rows=2))
    lora = parity.rows_of(parity.random_adapter(model, CONFIG), CONFIG, 2)
    positions = jnp.broadcast_to(jnp.arange(50), tokens.shape)

    def loss(lora, params, recompute):
        attend = PackedAttention(positions, jnp.ones_like(positions))
        hidden, _ = model.forward(params, lora, tokens, positions, attend, recompute=recompute)
        return (hidden**2).mean()

    options = {"xla_backend_optimization_level": 0}
    ways = NOTHING, Recompute(3, block_tokens=30), *([Recompute(1, block_tokens=30, keeping=3)] if apart else [])
    made = [jax.jit(partial(jax.grad(loss), recompute=way), compiler_options=options) for way in ways]
    plain, *others = (way(lora, params).weights for way in made)
    for other in others:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), other, plain)


@kinds
def test_a_row_has_the_same_bits_beside_other_tenants_and_beside_nan(case, tmp_path):
    model, params = load_model(make_model(tmp_path, case.config, tokenizer=False))
    tokens = parity.tokens_of(case._replace(length=16), 0, rows=3)
    lora = parity.rows_of(parity.random_adapter(model, CONFIG), CONFIG, 3)

    @jax.jit
    def run(params, lora, tokens):
        def loss(lora):
            logits = parity.logits(model, params, tokens, lora)
            return (logits[1] ** 2).mean(), logits[1]

        gradients, logits = jax.grad(loss, has_aux=True)(lora)
        return logits, jax.tree.map(lambda g: g[:, 1], gradients.weights)

    def poisoned(w):
        w = np.array(w)
        w[:, 0] = np.nan
        w[:, 2] *= 3
        return w

    alone = run(params, lora, tokens)
    other_tokens = np.stack([np.full_like(tokens[0], 5), tokens[1], tokens[1][::-1]])
    beside = run(params, LoraRows(jax.tree.map(poisoned, lora.weights), lora.scale), other_tokens)
    jax.tree.map(np.testing.assert_array_equal, beside, alone)


BF16_MEAN_BOUND = {"qwen3": 0.015, "llama": 0.015, "qwen3_moe_sparse_step": 0.08, "deepseek": 0.08}
BF16_MEAN_BOUND |= {"phi3": 0.015, "gemma3": 0.015, "qwen3_5": 0.04, "gpt_oss": 0.12}
BF16_BOUND = 0.1
"""|Δ log-probability| in nats against fp32 of the same weights, as the README states it. Six seeds of the tiny random
models measure means of 0.009 to 0.012 and at most 0.065 without experts; means of 0.015 to 0.058 with them, where a
router's near tie may fall the other way. Where the delta rule's output is near 0 its norm amplifies rounding: means of
0.028 to 0.032, and at most 0.35. gpt-oss: means of 0.067 to 0.091; why it is above other experts is not known."""
BF16_BOUND_RECURRENT = 0.5


def log_probabilities(model, params, tokens):
    return jax.nn.log_softmax(parity.logits(model, params, tokens))


@kinds
def test_bf16_log_probabilities_stay_near_fp32(case, tmp_path):
    forwards = {}
    for seed in (0, 1, 2):
        folder, logprobs = make_model(tmp_path / str(seed), case.config, seed, tokenizer=False), {}
        tokens = parity.tokens_of(case, seed, rows=4)
        for dtype in ("float32", "bfloat16"):
            model, params = load_model(folder, dtype)
            forward = forwards.setdefault(dtype, jax.jit(partial(log_probabilities, model)))
            scores = np.asarray(forward(params, tokens))[:, :-1]
            logprobs[dtype] = np.take_along_axis(scores, tokens[:, 1:, None], axis=-1)
        error = np.abs(logprobs["bfloat16"] - logprobs["float32"])
        assert error.mean() < BF16_MEAN_BOUND[case.name]
        bound = BF16_BOUND_RECURRENT if model.state_layers else BF16_BOUND
        assert error.max() < bound or "num_experts_per_tok" in case.config
