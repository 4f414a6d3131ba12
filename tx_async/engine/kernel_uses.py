"""What the kernels of a device (`kernels.py`) do for one model: some of its shapes may be none of theirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tx_async.engine.devices import NOT_HERE
from tx_async.engine.kernels import HEADS, PLAIN, Kernels, Paged, TrainedHeads, choose
from tx_async.engine.platform import Platform
from tx_async.errors import TxError
from tx_async.layers.mla import LatentAttention
from tx_async.layers.moe import MoeMlp
from tx_async.models.decoder import Decoder
from tx_async.wire.worker import EngineConfig


class KernelUse(NamedTuple):
    task: str
    runs: str
    """The kernel that runs it in at least one layer, or PLAIN."""
    plain: str
    """Which layers run in the plain version and why; "" = none do."""

    def __str__(self) -> str:
        return f"{self.task}: {self.runs}" + (f" ({self.plain})" if self.plain else "")


def choose_for(model: Decoder, here: Platform) -> Kernels:
    """The kernels that run on this device, tried with what the model's layers have."""
    if not here.paged_kernel:
        return choose(here)
    mixers = [layer.mixer for layer in model.layers if layer.mixer.keeps.pages]
    tensor = model.mesh.shape["tensor"] if model.mesh is not None else 1
    paged = tuple(dict.fromkeys(_paged(mixer, tensor) for mixer in mixers)) or (Paged(),)
    return choose(
        here, paged, tuple(dict.fromkeys(_trained_heads(mixer, model.mesh) for mixer in mixers)) or (TrainedHeads(),)
    )


def _trained_heads(mixer: Any, mesh: Any) -> TrainedHeads:
    """The case that is like the mixer."""
    if _Shapes(jnp.dtype(jnp.bfloat16), 0, 0, mesh).not_in_training(mixer):
        return TrainedHeads()
    _, features, values = _heads(mixer)
    return TrainedHeads(features, values, mixer.keeps.window > 0, getattr(mixer, "sinks", False))


def _paged(mixer: Any, tensor: int) -> Paged:
    """The case that is like the mixer. Of latent attention it has a device's own heads: blocks are as large."""
    from tx_async.engine import paged_kernel

    features, v_features = mixer.keeps.pages["k"][1], _v_features(mixer)
    if v_features:
        pool: Any = jax.ShapeDtypeStruct((1, 16, 1, features), jnp.bfloat16)
        fits = paged_kernel.fits(pool, 16, v_features) and not mixer.num_heads % tensor
        return Paged(mixer.num_heads // tensor, features, v_features) if fits else Paged()
    return Paged(features=features if features in HEADS else HEADS[0], has_sinks=getattr(mixer, "sinks", False))


def _v_features(mixer: Any) -> int:
    """As in `Attend`: what its one pool has of values."""
    return mixer.kv_lora_rank if isinstance(mixer, LatentAttention) else 0


def _heads(mixer: Any) -> tuple[int, int, int]:
    """(key heads, features of a query or key, features of a value) as training has them."""
    if isinstance(mixer, LatentAttention):
        return mixer.num_heads, mixer.nope_dim + mixer.rope_dim, mixer.v_dim
    (heads, features), (_, values) = mixer.keeps.pages.values()
    return heads, features, values


def of_folder(folder: str, here: Platform) -> tuple[KernelUse, ...]:
    """What runs on this device for a base model; () where its `config.json` cannot be read."""
    from tx_async.models.load import model_of

    try:
        model = model_of(Path(folder))
    except TxError:
        return ()
    return uses(choose_for(model, here), model, EngineConfig(), here)


def uses(
    kernels: Kernels, model: Decoder, config: EngineConfig, here: Platform, mesh: Any = None, dtype: Any = None
) -> tuple[KernelUse, ...]:
    """mesh: of the devices that run it; dtype: of the weights, None = as configured."""
    pages = 1 if model.state_layers else max(1, here.prefill_tile_tokens // config.kv_page_size)
    dtype = jnp.dtype(dtype or config.dtype or here.dtype)
    why = _Shapes(dtype, config.kv_page_size, pages * config.kv_page_size, mesh)
    mixers = [layer.mixer for layer in model.layers if layer.mixer.keeps.pages]
    mlps = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoeMlp)]
    made = [
        _use("training attention", "flash_attention", kernels.flash_attention, mixers, why.not_in_training),
        _use("decode attention", "paged_attention", kernels.paged_attention, mixers, why.not_in_decode),
        _use("prefill attention", "paged_prefill", kernels.paged_prefill, mixers, why.not_in_prefill),
    ]
    if mlps:
        made.append(_use("experts", "grouped_product", kernels.grouped_product, mlps, why.not_of_experts))
    return tuple(made)


def _use(task: str, kernel: str, runs: Any, layers: Sequence[Any], why: Callable[[Any], str]) -> KernelUse:
    if not runs:
        return KernelUse(task, PLAIN, NOT_HERE)
    reasons = Counter(why(layer) for layer in layers)
    plain = [(reason, count) for reason, count in reasons.items() if reason]
    if not plain:
        return KernelUse(task, kernel, "")
    if not reasons[""]:
        return KernelUse(task, PLAIN, ", ".join(reason for reason, _ in plain))
    told = "; ".join(f"plain in {count} of {len(layers)} layers: {reason}" for reason, count in plain)
    return KernelUse(task, kernel, told)


@dataclass(frozen=True)
class _Shapes:
    """Why a layer's shapes keep it in the plain version; "" = they do not. The kernels themselves are asked."""

    dtype: Any
    page_size: int
    tile_tokens: int
    """Tokens of a row in a prefill."""
    mesh: Any

    def not_in_training(self, mixer: Any) -> str:
        from tx_async.layers import flash_attention

        keys, features, values = _heads(mixer)
        row = lambda width: self._array(1, flash_attention.BLOCK, keys, width)  # noqa: E731
        return self._why(mixer, flash_attention.fits(row(features), row(values), self.mesh))

    def not_in_decode(self, mixer: Any) -> str:
        from tx_async.engine import paged_kernel

        return self._over_pages(mixer, paged_kernel.fits(self._pool(mixer), self.page_size, _v_features(mixer)))

    def not_in_prefill(self, mixer: Any) -> str:
        from tx_async.engine import prefill_kernel

        pool = self._pool(mixer)
        q = self._array(1, self.tile_tokens, 1, pool.shape[-1])
        return self._over_pages(mixer, prefill_kernel.fits(q, pool, self.page_size, _v_features(mixer)))

    def _over_pages(self, mixer: Any, fits: bool) -> str:
        latents = f"latents of {mixer.kv_lora_rank} + {mixer.rope_dim} features" if _v_features(mixer) else ""
        return self._why(mixer, fits and not _heads(mixer)[0] % self._tensor, latents)

    def not_of_experts(self, mlp: MoeMlp) -> str:
        from tx_async.layers import grouped_kernel

        inner = mlp.features_of_a_device(self.mesh)
        gate = self._array(mlp.router.num_experts, mlp.hidden_size, inner)
        if grouped_kernel.fits(self._array(1, 1, mlp.hidden_size), {"gate": gate}):
            return ""
        where = f" on each of {self._tensor} devices" if inner < mlp.intermediate_size else ""
        return f"{mlp.hidden_size} × {inner} features{where} in {self.dtype}"

    def _array(self, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def _pool(self, mixer: Any) -> Any:
        heads, features = next(iter(mixer.keeps.pages.values()))
        return self._array(1, self.page_size, heads, features)

    @property
    def _tensor(self) -> int:
        return self.mesh.shape["tensor"] if self.mesh is not None else 1

    def _why(self, mixer: Any, fits: bool, what: str = "") -> str:
        """what: has no such kernel, by default its heads."""
        if fits:
            return ""
        if self.dtype.itemsize != 2:
            return f"in {self.dtype}"
        heads, features, _ = _heads(mixer)
        if heads % self._tensor:
            return f"{heads} key heads on {self._tensor} devices"
        return what or f"heads of {features} features"
