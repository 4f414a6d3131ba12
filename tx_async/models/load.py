"""Loads Hugging Face folders into parameters on their devices.

Every buffer is made on its devices first; then each tensor is read once, in chunks of rows, and each chunk goes
straight to its place in the shards that want it: cast, dequantised and transposed there. The host holds two chunks,
never a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, Sharding

from tx_async import hub, model_folder
from tx_async.errors import BaseModelError
from tx_async.layers.sharding import weight_sharding
from tx_async.layers.weights import Weight
from tx_async.models import fused_experts, tensor_files
from tx_async.models.decoder import Decoder, Params, tree_of
from tx_async.models.families import FAMILIES
from tx_async.models.loading_bar import LoadingBar
from tx_async.models.tensor_files import StoredTensor
from tx_async.text_config import text_config

NOT_TEXT = (
    "visual.",
    "model.visual.",
    "vision_tower.",
    "model.vision_tower.",
    "multi_modal_projector.",
    "model.multi_modal_projector.",
    "mtp.",
    "model.mtp.",
)
PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""(the prefix that a vision model's folder puts before its text model's names, the prefix in a text model's folder)."""
CHUNK_BYTES = 32 * 2**20
HUB_FILES = ["*.json", "*.jinja", "tokenizer*", "*.model"]
"""All files but weights; of the weights, only the files of the index: some folders hold a second copy beside them
(gpt-oss's `original/`, Mistral's `consolidated*`)."""
HUB_FOLDERS = ["*/*"]

Report = Callable[[str, float, float], None]
"""(stage, bytes done, bytes in total)."""


def load_model(
    base_model: str | Path,
    dtype: str = "float32",
    progress: Report | None = None,
    mesh: Mesh | None = None,
    served_context_length: int = 0,
) -> tuple[Decoder, Params]:
    """-> (model, params). `base_model` is a folder or a hub name; raises `BaseModelError` that says what is wrong."""
    folder = fetch(base_model)
    model = replace(model_of(folder, served_context_length), mesh=mesh)
    return model, load_params(model, folder, dtype, progress)


def fetch(base_model: str | Path) -> Path:
    """The folder itself, or the hub's files in `huggingface_hub`'s cache: files that are there are kept, downloads of
    missing ones resume."""
    if Path(base_model).expanduser().is_dir():
        return Path(base_model).expanduser()
    folder = hub.snapshot(str(base_model), HUB_FILES, HUB_FOLDERS)
    return hub.snapshot(str(base_model), [*HUB_FILES, *model_folder.weight_files(folder)], HUB_FOLDERS)


def model_of(folder: Path, served_context_length: int = 0) -> Decoder:
    """The model that the folder's `config.json` describes. Raises `BaseModelError` that names the file."""
    config = model_folder.read_config(folder)
    try:
        return from_config(config, served_context_length)
    except BaseModelError as error:
        raise BaseModelError(f"{folder / model_folder.CONFIG}: {error.message}") from error


def from_config(config: dict[str, Any], served_context_length: int = 0) -> Decoder:
    """The (text) model that `config.json` describes. served_context_length: this server's, 0 = the model's own.
    Raises `BaseModelError` naming whatever is not implemented."""
    architecture = (config.get("architectures") or ["(none)"])[0]
    if architecture not in FAMILIES:
        raise BaseModelError(f"architecture {architecture} is not supported; known: {', '.join(FAMILIES)}.")
    try:
        return FAMILIES[architecture](text_config(config) | {"served_context_length": served_context_length})
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BaseModelError(f"It does not describe a {architecture}: {error!r}") from error


def load_params(model: Decoder, folder: Path, dtype: str, progress: Report | None = None) -> Params:
    """The folder's weights in `dtype` (those that are `wide` in fp32), on the devices of the model's mesh. Raises
    `BaseModelError` for files that are not this model's."""
    tensors = text_tensors(tensor_files.open_folder(folder))
    check(model, tensors)
    leaves = _empty_leaves(model.weights, [weight_sharding(weight, model.mesh) for weight in model.weights], dtype)
    places: dict[str, list[tuple[_Leaf, int]]] = {}
    for weight, leaf in leaves.items():
        for number, name in enumerate(weight.hf_names):
            places.setdefault(name, []).append((leaf, number))
    wanted = [
        (tensors[name], rows)
        for name in tensors
        if name in places
        for rows in _ranges(tensors[name], tensors)
        if any(leaf.wants(number, rows) for leaf, number in places[name])
    ]
    done, total = 0, sum((stop - start) * tensor.row_bytes for tensor, (start, stop) in wanted)
    bar = LoadingBar(total)
    for tensor, chunk in _read_ahead(wanted, tensors):
        for leaf, number in places[tensor.name]:
            leaf.write(number, chunk)
        done += chunk.values.nbytes
        bar.report(done)
        if progress:
            progress("loading weights", done, total)
    return tree_of({weight: leaf.assemble() for weight, leaf in leaves.items()})


def text_tensors(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The text model's tensors by its own names: vision towers and multi-token prediction are passed over, and the
    prefix that vision models' folders put before the names is removed."""
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith(NOT_TEXT):
            canonical = next((new + name.removeprefix(old) for old, new in PREFIXES if name.startswith(old)), name)
            found[canonical] = replace(tensor, name=canonical, shape=_shape(canonical, tensor.shape))
    return {tensor.name: tensor for tensor in fused_experts.one_by_one(found)}


def _shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The expected shape; the single scale of a whole fp8 tensor is one block."""
    return (1, 1) if name.endswith("_scale_inv") and len(shape) < 2 else shape


def check(model: Decoder, tensors: dict[str, StoredTensor]) -> None:
    """Raises `BaseModelError` naming missing, mis-shaped and unknown tensors, before anything is read."""
    expected = {name: weight.hf_shape for weight in model.weights for name in weight.hf_names}
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise BaseModelError(f"The model's files{_where(tensors)} lack {_some(missing)}.")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise BaseModelError(
                f"{tensor.path}: {name} has shape {list(tensor.shape)}; config.json implies {list(shape)}."
            )
    unknown = [name for name in tensors if name not in expected and not _harmless(model, name, expected)]
    if unknown:
        raise BaseModelError(
            f"The model's files{_where(tensors)} hold tensors that this architecture does not have: {_some(unknown)}."
        )
    for name in expected:
        scaled = f"{name}_scale_inv" in tensors
        if (tensors[name].dtype.itemsize == 1) != scaled:
            how = f"is {tensors[name].dtype} {'with' if scaled else 'without'} {name}_scale_inv"
            raise BaseModelError(f"{tensors[name].path}: {name} {how}.")


def _where(tensors: dict[str, StoredTensor]) -> str:
    return f" in {next(iter(tensors.values())).path.parent}" if tensors else ""


def _harmless(model: Decoder, name: str, expected: dict[str, Any]) -> bool:
    """Whether transformers ignores the tensor too."""
    if name.endswith(("rotary_emb.inv_freq", ".activation_scale", "_proj_scales")) or (
        model.tied and name == "lm_head.weight"
    ):
        return True
    if name.endswith("_scale_inv"):
        return name.removesuffix("_scale_inv") in expected
    return name.startswith(model.skipped)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---- chunks


@dataclass(frozen=True)
class _TensorRows:
    """Rows of a tensor, as they are in the file."""

    start: int
    values: np.ndarray
    scale: np.ndarray | None
    """fp8 only: the fp32 scale of each block that these rows touch."""
    block: tuple[int, int] = (1, 1)


def _read_ahead(
    wanted: list[tuple[StoredTensor, tuple[int, int]]], tensors: dict[str, StoredTensor]
) -> Iterator[tuple[StoredTensor, _TensorRows]]:
    """Read one chunk while the previous one is being placed."""
    with ThreadPoolExecutor(1) as reader:
        pending = None
        for tensor, (start, stop) in wanted:
            upcoming = tensor, reader.submit(_read_chunk, tensor, tensors.get(f"{tensor.name}_scale_inv"), start, stop)
            if pending:
                yield pending[0], pending[1].result()
            pending = upcoming
        if pending:
            yield pending[0], pending[1].result()


def _ranges(tensor: StoredTensor, tensors: dict[str, StoredTensor]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about CHUNK_BYTES; of a quantised tensor, whole blocks, unless it is one block."""
    scale = tensors.get(f"{tensor.name}_scale_inv")
    unit = _block_size(tensor, scale)[0] if scale and scale.shape[0] > 1 else 1
    step = max(1, CHUNK_BYTES // max(1, tensor.row_bytes) // unit) * unit
    for start in range(0, tensor.shape[0], step):
        yield start, min(start + step, tensor.shape[0])


def _block_size(tensor: StoredTensor, scale: StoredTensor) -> tuple[int, int]:
    """A block's size follows from the number of scales, rounded up to a power of two, as in all known checkpoints."""
    rows, cols = (
        1 << (-(-size // count) - 1).bit_length() for size, count in zip(tensor.shape, scale.shape, strict=True)
    )
    return rows, cols


def _read_chunk(tensor: StoredTensor, scale: StoredTensor | None, start: int, stop: int) -> _TensorRows:
    if scale is None:
        return _TensorRows(start, tensor.rows(start, stop), None)
    block = _block_size(tensor, scale)
    return _TensorRows(start, tensor.rows(start, stop), scale.rows(start // block[0], -(-stop // block[0])), block)


# ---- buffers


@dataclass
class _Shard:
    """One distinct piece of a leaf; replicas hold the same."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    buffers: dict[Any, Array]
    """The buffers, by device."""


def _empty_leaves(weights: Sequence[Weight], shardings: Sequence[Sharding], dtype: str) -> dict[Weight, _Leaf]:
    """Make every buffer on every device, with one program."""

    def zeros() -> list[Array]:
        return [jnp.zeros(weight.shape, jnp.float32 if weight.wide else dtype) for weight in weights]

    arrays = jax.jit(zeros, out_shardings=list(shardings))()
    return {weight: _Leaf(weight, empty) for weight, empty in zip(weights, arrays, strict=True)}


class _Leaf:
    """The buffers of one parameter on this process's devices, filled piece by piece."""

    def __init__(self, weight: Weight, empty: Array):
        self.weight, self.sharding = weight, empty.sharding
        self.lead = len(weight.shape) - len(weight.dims)
        shards: dict[tuple[int, ...], _Shard] = {}
        for piece in empty.addressable_shards:
            start = tuple(s.indices(size)[0] for s, size in zip(piece.index, weight.shape, strict=True))
            shards.setdefault(start, _Shard(start, piece.data.shape, {})).buffers[piece.device] = piece.data
        self.shards = list(shards.values())

    def wants(self, number: int, rows: tuple[int, int]) -> bool:
        """Whether a device of this process holds any of rows [start, stop) of tensor `hf_names[number]`."""
        axis = -1 if self.weight.transposed else self.lead
        return any(
            self._inside(shard, self._lead_of(number))
            and max(shard.start[axis], rows[0]) < min(shard.start[axis] + shard.shape[axis], rows[1])
            for shard in self.shards
        )

    def write(self, number: int, chunk: _TensorRows) -> None:
        """Put a chunk of tensor `hf_names[number]` where it belongs, and wait, so that its memory is free again."""
        lead = self._lead_of(number)
        for shard in self.shards:
            if self._inside(shard, lead):
                self._write_shard(shard, lead, chunk)

    def _write_shard(self, shard: _Shard, lead: tuple[int, ...], chunk: _TensorRows) -> None:
        order = slice(None, None, -1) if self.weight.transposed else slice(None)
        starts, sizes = shard.start[self.lead :][order], shard.shape[self.lead :][order]
        first, last = max(starts[0], chunk.start), min(starts[0] + sizes[0], chunk.start + len(chunk.values))
        if first >= last:
            return
        cut = (
            slice(first - chunk.start, last - chunk.start),
            *(slice(s, s + n) for s, n in zip(starts[1:], sizes[1:], strict=True)),
        )
        inside = (first - starts[0], *(0 for _ in starts[1:]))[order]
        at = (*(i - s for i, s in zip(lead, shard.start, strict=False)), *inside)
        values, scale = chunk.values[cut], _scale_of(chunk, cut)
        for device, buffer in shard.buffers.items():
            shard.buffers[device] = _put(buffer, *jax.device_put((values, scale), device), at, self.weight.transposed)
        jax.block_until_ready(list(shard.buffers.values()))

    def assemble(self) -> Array:
        arrays = [buffer for shard in self.shards for buffer in shard.buffers.values()]
        return jax.make_array_from_single_device_arrays(self.weight.shape, self.sharding, arrays)

    def _lead_of(self, number: int) -> tuple[int, ...]:
        """A tensor's place along the leading axes: (layer, expert), (layer,) or ()."""
        if not self.weight.stack:
            return ()
        experts = self.weight.num_experts
        return divmod(number, experts) if experts else (number,)

    def _inside(self, shard: _Shard, lead: tuple[int, ...]) -> bool:
        return all(s <= i < s + n for i, s, n in zip(lead, shard.start, shard.shape, strict=False))


def _scale_of(chunk: _TensorRows, cut: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """(scales with columns spread out [blocks, cols], the block of each row), for the cut rows and columns."""
    if chunk.scale is None:
        return None
    rows, cols = cut
    spread = chunk.scale[:, np.arange(cols.start, cols.stop) // chunk.block[1]]
    return spread, np.arange(rows.start, rows.stop, dtype=np.int32) // chunk.block[0]


@partial(jax.jit, donate_argnums=0, static_argnums=4)
def _put(
    buffer: Array, values: Array, scale: tuple[Array, Array] | None, at: tuple[int, ...], transposed: bool
) -> Array:
    if scale is not None:
        values = values.astype(jnp.float32) * scale[0][scale[1]]
    values = (values.T if transposed else values).astype(buffer.dtype)
    return jax.lax.dynamic_update_slice(buffer, values.reshape((1,) * (buffer.ndim - values.ndim) + values.shape), at)
