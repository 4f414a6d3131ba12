"""Converts adapters of experts that are one parameter (transformers 5) to and from one adapter per expert and
projection.

PEFT nests the wrappers of `mlp.experts`' parameters: gate_up_proj inside (`base_layer`), down_proj outside. A is
[experts · rank, in], B is [out, rank · experts], experts varying slowest in A and fastest in B. The fused gate_up_proj
has one A for both halves, which are blocks of its output, or, interleaved (gpt-oss), every other feature of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tx_async.errors import InvalidRequest
from tx_async.layers.lora import LoraTarget

Scale = Callable[[str, int], float]
"""(module, rank) -> PEFT's scaling."""


class Pair(NamedTuple):
    """One module's adapter as PEFT applies it: y += x Aᵀ Bᵀ · scale."""

    a: np.ndarray
    """[rank, in]."""
    b: np.ndarray
    """[out, rank]."""
    scale: float


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of single experts become two parameters of each layer, with gate and up interleaved; others stay as they
    are.

    gate_up_proj has twice the rank: A holds gate's above up's, B is gate's in even and up's in odd features.
    """
    found, experts = {}, {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.lora_([AB])\.weight", name)
        if match:
            experts.setdefault(match[1], {}).setdefault((match[3], match[4]), {})[int(match[2])] = tensor
        else:
            found[name] = tensor
    for module, halves in experts.items():
        stacked = {
            key: np.stack([of[e] for e in sorted(of)]) for key, of in halves.items()
        }  # A [E, r, in], B [E, out, r]
        gate, up = stacked["gate_proj", "B"], stacked["up_proj", "B"]
        both = np.zeros((len(gate), 2 * gate.shape[1], 2 * gate.shape[2]), np.float32)
        both[:, 0::2, : gate.shape[2]], both[:, 1::2, gate.shape[2] :] = gate, up
        a = np.concatenate([stacked["gate_proj", "A"], stacked["up_proj", "A"]], axis=1)
        found |= _wrapped(f"{module}.base_layer", a, both)
        found |= _wrapped(module, stacked["down_proj", "A"], stacked["down_proj", "B"])
    return found


def _wrapped(module: str, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """a [E, r, in], b [E, out, r]"""
    flat = np.ascontiguousarray(b.transpose(1, 2, 0)).reshape(b.shape[1], -1)
    return {f"{module}.lora_A.weight": a.reshape(-1, a.shape[2]), f"{module}.lora_B.weight": flat}


def fused_settings(rank: int, alpha: int, trained: bool) -> dict[str, Any]:
    """Settings for adapter_config.json. Twice the rank keeps the scale with twice the alpha."""
    if not trained:
        return {}
    both = "mlp.experts.gate_up_proj"
    return {
        "target_parameters": ["mlp.experts.down_proj", both],
        "rank_pattern": {both: 2 * rank},
        "alpha_pattern": {both: 2 * alpha},
    }


def unfused(
    targets: list[LoraTarget], module: str, a: np.ndarray, b: np.ndarray, scale_of: Scale, interleaved: bool
) -> dict[str, Pair]:
    """module -> the pair of each expert. targets: those of this layer's experts; the name does not tell which parameter
    a tensor belongs to, but the shapes do.

    Where B is block diagonal (PEFT made it from two adapters), each half has its own ranks.
    """
    experts = module.split(".base_layer")[0]
    gate, down, count = targets[0], targets[-1], targets[0].num_experts
    a, b = a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count).transpose(2, 0, 1)
    shape = (a.shape[2], b.shape[1])
    inside = module.endswith(".base_layer")
    fits_both = shape == (gate.in_features, 2 * gate.out_features)
    if shape == (down.in_features, down.out_features) and not (fits_both and inside):
        halves = {"down_proj": (a, b)}
        scale = scale_of(f"{experts}.down_proj", a.shape[1])
    elif fits_both:
        halves = dict(zip(("gate_proj", "up_proj"), _split(a, b, interleaved), strict=True))
        scale = scale_of(f"{experts}.gate_up_proj", a.shape[1])
    else:
        raise InvalidRequest(
            f"The adapter's {module} maps {shape[0]} to {shape[1]} features: it belongs to another model."
        )
    return {f"{experts}.{e}.{name}": Pair(a[e], b[e], scale) for name, (a, b) in halves.items() for e in range(count)}


def _split(a: np.ndarray, b: np.ndarray, interleaved: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A [E, R, in], B [E, 2F, R] of a fused gate_up_proj -> those of gate, then those of up."""
    features, rank = b.shape[1] // 2, b.shape[2] // 2
    parts = (b[:, 0::2], b[:, 1::2]) if interleaved else (b[:, :features], b[:, features:])
    blocks = not parts[0][..., rank:].any() and not parts[1][..., :rank].any()
    for i, part in enumerate(parts):
        ranks = slice(i * rank, (i + 1) * rank) if blocks and rank else slice(None)
        yield a[:, ranks], part[:, :, ranks]
