"""The kernels of experts, interpreted: adapters of every layer stay in one stack, thin ranks are padded. (Outputs and
gradients beside the plain loop: `engine/kernels.py`'s own test, which runs in `tests/engine/test_kernels.py`.)"""

import jax.numpy as jnp
import numpy as np

from tx_async.layers import grouped_kernel
from tx_async.layers.grouped import RowBlocks, block_shape, experts_mlp
from tx_async.layers.lora import ExpertLora
from tx_async.layers.mlp import silu_gated

LAYERS, ADAPTERS, EXPERTS, RANK, D, F = 2, 2, 2, 3, 64, 64


def test_blocks_read_their_own_layers_adapter_out_of_the_stack_and_a_nan_stays_in_its_adapters_blocks():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / 8, jnp.bfloat16)

    sides = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    w = {name: normal(EXPERTS, *side) for name, side in sides.items()}
    lead = (LAYERS, ADAPTERS, EXPERTS)
    pairs = {name: (normal(*lead, side[0], RANK), normal(*lead, RANK, side[1])) for name, side in sides.items()}
    pairs["up"] = (pairs["up"][0].at[1, 1].set(jnp.nan), pairs["up"][1])
    lora = ExpertLora(pairs, jnp.array([1.0, 0.5]), None, jnp.int32(1))
    blocks = RowBlocks(jnp.array([1, 0, 1, 0]), jnp.array([0, 1, -1, 0]), jnp.array([True, True, True, False]))
    x = normal(4, grouped_kernel.ROWS_MIN, D)

    ours = np.asarray(grouped_kernel.experts_mlp(silu_gated, x, blocks, w, lora, interpret=True), np.float32)
    plain = np.asarray(experts_mlp(silu_gated, x, blocks, w, lora.of_layer), np.float32)
    assert np.isnan(plain[1]).all() and np.isnan(ours[1]).all()
    np.testing.assert_allclose(ours[[0, 2, 3]], plain[[0, 2, 3]], atol=2e-2 * np.nanmax(np.abs(plain)))
    assert (ours[3] == 0).all()


def test_blocks_for_the_kernels_are_tall_enough_for_a_tensor_core():
    assert block_shape(8, 128, least=grouped_kernel.ROWS_MIN) == (8, 16)
    assert block_shape(32_768, 128, least=grouped_kernel.ROWS_MIN) == block_shape(32_768, 128) == (384, 128)
