"""Turns a PEFT adapter made elsewhere into the files of a checkpoint here: `python -m tx_async.models.import_adapter`.

It runs in a process of its own, because it needs the base model's shapes and therefore JAX, which the server never
imports. It reads no weight of the base model. It prints the adapter's `AdapterConfig` as JSON, or why the adapter is
refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save

from tx_async import age, model_folder
from tx_async.errors import BaseModelError, InvalidRequest, TxError
from tx_async.models import tensor_files
from tx_async.models.decoder import Decoder
from tx_async.models.load import model_of
from tx_async.models.peft import from_peft, to_peft
from tx_async.names import is_hub_name
from tx_async.storage.checkpoint_files import ADAPTER, ADAPTER_CONFIG
from tx_async.wire.worker import AdapterConfig

FP32_MIN, FP32_MAX = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def convert(
    model: Decoder, folder: Path, base_names: Sequence[str], max_rank: int
) -> tuple[dict[str, bytes], AdapterConfig]:
    """-> (files, the adapter's shape): fp32, one rank, and the alpha that every adapter of this server has.

    base_names: names of the served model; PEFT loads it by the first. Raises `InvalidRequest` naming what does not fit.
    """
    if name := age.encrypted_file(folder, (ADAPTER_CONFIG, ADAPTER)):
        raise InvalidRequest(f"{name} is encrypted with age: decrypt the adapter first.")
    settings = _settings(folder, base_names)
    weights, config = from_peft(model, _tensors(folder / ADAPTER), settings)
    if config.rank > max_rank:
        raise InvalidRequest(
            f"The adapter has rank {config.rank}; this server allows 1 to {max_rank} (its setting max_lora_rank in "
            "backend_config)."
        )
    if not all(np.isfinite(half).all() for stack in weights.values() for pair in stack.values() for half in pair):
        raise InvalidRequest("The adapter holds weights that are NaN or infinite.")
    tensors, ours = to_peft(model, weights, config)
    ours["base_model_name_or_path"] = base_names[0] if base_names else None
    return {ADAPTER: save(tensors, {"format": "pt"}), ADAPTER_CONFIG: json.dumps(ours).encode()}, config


def _settings(folder: Path, base_names: Sequence[str]) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    settings = model_folder.read_json(path)
    if settings is None:
        raise InvalidRequest(f"{folder} has no {ADAPTER_CONFIG}: it is not the folder of a PEFT adapter.")
    if settings.get("peft_type") == "LORA":
        for field in ("r", "lora_alpha"):
            _check_number(field, settings.get(field))
        for field in ("rank_pattern", "alpha_pattern"):
            _check_patterns(field, settings.get(field))
    base = settings.get("base_model_name_or_path")
    if isinstance(base, str) and _is_another(base, base_names):
        raise InvalidRequest(f"{ADAPTER_CONFIG}: the adapter was made for {base}; this server has {base_names[0]}.")
    return settings


def _check_patterns(field: str, patterns: object) -> None:
    """PEFT's patterns are regular expressions, each with a number."""
    if patterns is None:
        return
    if not isinstance(patterns, dict):
        raise InvalidRequest(f"{ADAPTER_CONFIG}: {field} is not an object.")
    for pattern, value in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise InvalidRequest(
                f"{ADAPTER_CONFIG}: {field} has {pattern!r}, not a regular expression: {error}."
            ) from None
        _check_number(f"{field}[{pattern!r}]", value)


def _check_number(field: str, value: Any) -> None:
    """What fp32 would make 0 or infinite is refused, too: every weight is multiplied by it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and FP32_MIN <= value <= FP32_MAX):
        raise InvalidRequest(
            f"{ADAPTER_CONFIG}: {field} is {repr(value)[:40]}; it must be a number above 0, and finite."
        )


def _is_another(base: str, names: Sequence[str]) -> bool:
    """Whether these are two hub names whose last parts differ. A folder may have any name: there only the shapes can
    tell."""
    hub_names = [name for name in names if is_hub_name(name)]
    last = {name.rpartition("/")[2].lower() for name in names}
    return is_hub_name(base) and bool(hub_names) and base.rpartition("/")[2].lower() not in last


def _tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise InvalidRequest(f"{path.parent} has no {ADAPTER}; adapters in other formats are not read.")
    return {tensor.name: tensor.rows(0, tensor.shape[0]) for tensor in tensor_files.open_file(path) if tensor.shape}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-rank", type=int, required=True)
    parser.add_argument("--name", action="append", default=[])
    args = parser.parse_args(arguments)
    try:
        files, config = convert(model_of(args.base), args.adapter, args.name, args.max_rank)
    except (InvalidRequest, BaseModelError) as error:
        print(_one_line(error))
        return 1
    for name, content in files.items():
        (args.out / name).write_bytes(content)
    print(msgspec.json.encode(config).decode())
    return 0


def _one_line(error: TxError) -> str:
    return " ".join(error.message.split())


if __name__ == "__main__":
    sys.exit(main())
