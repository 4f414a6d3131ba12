"""The vocabulary as a device sees it: all of it or, on a mesh whose tensor axis cuts it, its own part.

Logits are made where the unembedding lies, a part of the vocabulary on each device. There they stay. What the devices
of a tensor axis tell each other of a row are sums, maxima and candidates, never its logits.

Laid out, the vocabulary is [segments, lanes] (token = segment * lanes + lane), so that sums over it run along
contiguous lanes. A part has the segments that its tokens stand in. Where parts do not begin with a segment it has
those of its edges, too, with nothing in the cells of others' tokens: a token stands in the same segment and lane on
every mesh, and a draw with the same random numbers finds the same token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tx_async.layers.sharding import row_axis

SEGMENTS = 128
AXIS = "tensor"


@dataclass(frozen=True)
class VocabularyParts:
    """Of `size` tokens, cut in parts along the tensor axis. With more than one, its methods run on each device of a
    mesh (`Cuts.run`), and a part is the device's own."""

    size: int
    num_parts: int = 1

    @property
    def is_cut(self) -> bool:
        return self.num_parts > 1

    @property
    def part_size(self) -> int:
        """The last parts of a vocabulary that the devices do not divide are filled up with tokens of no weight."""
        return -(-self.size // self.num_parts)

    @property
    def num_lanes(self) -> int:
        return -(-self.size // SEGMENTS)

    @property
    def num_segments(self) -> int:
        """The most segments that a part stands in."""
        if not self.is_cut:
            return SEGMENTS
        begins = (part * self.part_size % self.num_lanes for part in range(self.num_parts))
        return max(-(-(begin + self.part_size) // self.num_lanes) for begin in begins)

    @property
    def _first(self) -> Array:
        """This device's first token."""
        return jax.lax.axis_index(AXIS) * self.part_size if self.is_cut else jnp.int32(0)

    @property
    def _first_segment(self) -> Array:
        return self._first // self.num_lanes

    # ---- where tokens stand

    def own(self, logits: Array) -> Array:
        """This device's part of logits that may be those of all tokens: [B, V] or [B, part] -> [B, part]"""
        if logits.shape[1] == self.part_size:
            return logits
        filling = self.num_parts * self.part_size - self.size
        logits = jnp.pad(logits, ((0, 0), (0, filling)), constant_values=-jnp.inf)
        return jax.lax.dynamic_slice_in_dim(logits, self._first, self.part_size, axis=1)

    @property
    def tokens(self) -> Array:
        """This part's: int32 [part]; the last for what fills the part up."""
        return jnp.minimum(self._first + jnp.arange(self.part_size), self.size - 1)

    def lay_out(self, logits: Array) -> Array:
        """[B, part] -> [B, segments, lanes]; cells of no token of this part are -inf."""
        rows, num_cells = logits.shape[0], self.num_segments * self.num_lanes
        if num_cells != self.part_size and not self.is_cut:
            logits = jnp.pad(logits, ((0, 0), (0, num_cells - self.part_size)), constant_values=-jnp.inf)
        elif num_cells != self.part_size:
            cells = jnp.full((rows, num_cells), -jnp.inf)
            logits = jax.lax.dynamic_update_slice(cells, logits, (0, self._first % self.num_lanes))
        return logits.reshape(rows, self.num_segments, self.num_lanes)

    @property
    def index(self) -> Array:
        """The tokens that the cells stand for: int32 [segments, lanes]."""
        cells = jnp.arange(self.num_segments * self.num_lanes, dtype=jnp.int32)
        cells = cells.reshape(self.num_segments, self.num_lanes)
        return cells + self._first_segment * self.num_lanes if self.is_cut else cells

    @property
    def end(self) -> int:
        """Above every token's index."""
        return SEGMENTS * self.num_lanes

    def places(self, tokens: Array) -> Array:
        """Where tokens stand in this part; its end for -1 and for others' tokens."""
        places = tokens - self._first
        return jnp.where((places >= 0) & (places < self.part_size), places, self.part_size)

    def at(self, x: Array, tokens: Array, *others: Array) -> tuple[Array, ...]:
        """-> (what stands at tokens [B, K] of x [B, part] or laid out, int32 -> [B, K]; the totals of others, which are
        laid out, [B] each), in one exchange."""
        flat, totals = x.reshape(x.shape[0], -1), [total_of(other) for other in others]
        if not self.is_cut:
            return jnp.take_along_axis(flat, tokens, axis=1), *totals
        places = tokens - self._first
        is_own = (places >= 0) & (places < self.part_size)
        if x.ndim > 2:
            places = places + self._first % self.num_lanes
        found = jnp.take_along_axis(flat, jnp.clip(places, 0, flat.shape[1] - 1), axis=1)
        own = jnp.concatenate([jnp.where(is_own, found, 0), *(total[:, None] for total in totals)], axis=1)
        all_ = self._sum(own)
        return all_[:, : tokens.shape[1]], *all_[:, tokens.shape[1] :].T

    # ---- over all tokens of each row

    def likeliest(self, z: Array) -> tuple[Array, Array]:
        """-> (the largest value of each row [B], the lowest token that has it int32 [B]; 0 in a row of NaN)."""
        top = z.max((1, 2))
        first = jnp.where(z == top[:, None, None], self.index, self.end).min(1).min(1)
        if self.is_cut:
            bits, firsts = self._told(bits_of(top), first)
            tops = jax.lax.bitcast_convert_type(bits, jnp.float32)
            top = tops.max(0)
            first = jnp.where(tops == top, firsts, self.end).min(0)
        return top, jnp.where(first == self.end, 0, first).astype(jnp.int32)

    def totals(self, cells: Callable[[Array], Array], bounds: Array) -> list[Array]:
        """The totals of cells(bound), in one exchange: bounds [n, B, 1, 1] -> those of some bounds after those of
        others, [m, B] each."""
        return [self._sum(totals) for totals in self.own_totals(cells, bounds)]

    def own_totals(self, cells: Callable[[Array], Array], bounds: Array) -> list[Array]:
        """The same of this part alone. A part is small enough to be read again for each bound."""
        return [cells(bounds).sum((2, 3))] if self.is_cut else [total_of(cells(bound))[None] for bound in bounds]

    def totals_and_before(self, x: Array, mask: Array) -> tuple[Array, Array, Array]:
        """-> (the total of x, how many cells of the mask are set, how many of them in parts before this one), [B]."""
        total, count = total_of(x), total_of(mask)
        if not self.is_cut:
            return total, count, jnp.zeros_like(count)
        totals, counts = self._told(bits_of(total), count)
        is_before = jnp.arange(self.num_parts) < jax.lax.axis_index(AXIS)
        before = jnp.where(is_before[:, None], counts, 0).sum(0)
        return jax.lax.bitcast_convert_type(totals, jnp.float32).sum(0), counts.sum(0), before

    def by_lane(self, x: Array) -> Array:
        """[B, segments, lanes] -> [B, lanes], the sums over all segments"""
        return self._sum(x.sum(1))

    def column(self, x: Array, lane: Array) -> Array:
        """A lane of each row: [B, segments, lanes], [B] -> [B, SEGMENTS]"""
        column = jnp.take_along_axis(x, lane[:, None, None], axis=2)[:, :, 0]
        if not self.is_cut:
            return column
        # Parts that have cells of the same segment each have something in their own alone.
        everywhere = jnp.zeros((x.shape[0], SEGMENTS + self.num_segments), x.dtype)
        placed = jax.lax.dynamic_update_slice(everywhere, column, (0, self._first_segment))
        return self._sum(placed[:, :SEGMENTS])

    def top_k(self, logits: Array, k: int) -> tuple[Array, Array]:
        """The k largest of [B, part] and their tokens, of equals the lowest: the parts' own candidates, merged."""
        values, tokens = largest(logits, min(k, self.part_size))
        if not self.is_cut:
            return values, tokens
        of_parts = self._told(bits_of(values), tokens + self._first)
        bits, tokens = (jnp.moveaxis(x, 0, 1).reshape(len(x[0]), -1) for x in of_parts)
        values, places = jax.lax.top_k(jax.lax.bitcast_convert_type(bits, jnp.float32), k)
        return values, jnp.take_along_axis(tokens, places, axis=1)

    # ---- between devices

    def _sum(self, x: Array) -> Array:
        return jax.lax.psum(x, AXIS) if self.is_cut else x

    def _told(self, *xs: Array) -> Sequence[Array]:
        """What every part has, of arrays of int32: [parts, ...] of each. It is little: as a sum in which each part has
        its own place it is one kernel, which stays in a CUDA graph also within a branch, as a gather does not."""
        own = jnp.stack(xs)[:, None]
        everywhere = jnp.zeros((len(xs), self.num_parts, *own.shape[2:]), own.dtype)
        placed = jax.lax.dynamic_update_slice_in_dim(everywhere, own, jax.lax.axis_index(AXIS), axis=1)
        return list(self._sum(placed))


@dataclass(frozen=True)
class Cuts:
    """How rows and their logits lie on a mesh while tokens are drawn. Devices that have the same part of the
    vocabulary have some rows each, where that goes."""

    mesh: Mesh | None
    vocabulary: VocabularyParts
    rows: PartitionSpec
    """Of arrays [B, ...]."""
    logits: PartitionSpec
    """Of the logits [B, V], as they are made: whole where the tensor axis does not divide the vocabulary."""
    parts: PartitionSpec
    """Of [B, parts * part_size]: what programs keep for each token."""

    @classmethod
    def of(cls, mesh: Mesh | None, vocab: int, num_rows: int) -> Cuts:
        if mesh is None:
            nothing = PartitionSpec()
            return cls(None, VocabularyParts(vocab), nothing, nothing, nothing)
        axes: tuple[str, ...] = ()
        for axis in ("fsdp", "expert"):
            if num_rows % mesh.shape[axis] == 0:
                axes, num_rows = (*axes, axis), num_rows // mesh.shape[axis]
        num_parts = mesh.shape[AXIS]
        made = None if vocab % num_parts else AXIS
        vocabulary = VocabularyParts(vocab, num_parts)
        return cls(mesh, vocabulary, PartitionSpec(axes), PartitionSpec(axes, made), PartitionSpec(axes, AXIS))

    def made(self, logits: Array) -> Array:
        """Logits [B, V] where their product makes them: that some devices draw for some rows concerns no layer."""
        if self.mesh is None:
            return logits
        spec = PartitionSpec(row_axis(self.mesh, logits.shape[0]), self.logits[1])
        return jax.lax.with_sharding_constraint(logits, NamedSharding(self.mesh, spec))

    def run(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """The function on every device, with its rows and its part. Specs are those of `shard_map`."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def total_of(x: Array) -> Array:
    """[B, segments, lanes] -> [B]"""
    return x.sum(1).sum(1)


def bits_of(x: Array) -> Array:
    """fp32 as int32; numbers that are not negative order as their bits do."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def largest(x: Array, k: int) -> tuple[Array, Array]:
    """The k largest of each row, of equals the first, and their indexes: [B, n] -> [B, k] twice. Each is the largest of
    its block, or one of that block's others: so they are in the k blocks with the largest, and the two sorts are short.
    """
    rows, n = x.shape
    width = math.isqrt(n // k)
    if width < 2:
        return jax.lax.top_k(x, k)
    filled = jnp.pad(x, ((0, 0), (0, -n % width)), constant_values=-jnp.inf)
    blocks = filled.reshape(rows, -1, width)
    chosen = jnp.sort(jax.lax.top_k(blocks.max(2), k)[1], axis=1)
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(rows, -1)
    values, places = jax.lax.top_k(candidates, k)
    return values, jnp.take_along_axis(chosen, places // width, axis=1) * width + places % width
