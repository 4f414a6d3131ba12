"""Which quantised folders are read: fp8 and MXFP4 are dequantised while loading; every other kind is refused by
name."""

from __future__ import annotations

from typing import Any

from tx_async.errors import BaseModelError


def check_quantization(config: dict[str, Any]) -> None:
    """Accepts fp8 (e4m3) in blocks of powers of two, or with one scale per tensor, and MXFP4 (gpt-oss). Raises
    `BaseModelError` for every other kind."""
    quantization = config.get("quantization_config")
    if not quantization:
        return
    if quantization.get("quant_method") == "mxfp4":
        return
    method, blocks = quantization.get("quant_method"), quantization.get("weight_block_size") or ()
    known = method == "fp8" and quantization.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn")
    if not known or len(blocks) not in (0, 2) or any(size & (size - 1) for size in blocks):
        raise BaseModelError(
            f"quantization_config {_name(quantization)!r} is not supported; only fp8 (e4m3), in blocks "
            "of powers of two or per tensor, and mxfp4 are. Take the model's unquantised folder, or its fp8 one."
        )


def _name(quantization: dict[str, Any]) -> str:
    """The name that its maker uses: the method, and the format that it gave the weights."""
    groups = quantization.get("config_groups")
    weights = next((group.get("weights") or {} for group in groups.values()), {}) if isinstance(groups, dict) else {}
    bits = weights.get("num_bits") or quantization.get("bits")
    kind = quantization.get("quant_algo") or quantization.get("format") or quantization.get("fmt")
    number = f"{weights.get('type', 'int')}{bits}" if bits else None
    return " ".join(str(word) for word in (quantization.get("quant_method"), kind, number) if word)
