"""The differences between a CPU and an accelerator: one table with a column for each, and the only place that tells
them apart.

`current()` alone asks JAX where it runs. It is called once at start; the result is passed in, as the sharding rules
are, so that programs for a device that is absent are made from the same table (`bench/gpu_programs.py`).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import jax


@dataclass(frozen=True)
class Platform:
    """One column of the table."""

    name: str
    """JAX's name for it: cpu, gpu, tpu."""
    dtype: str
    """The dtype of the base weights, where the configuration names none."""

    # training
    shortest_row: int
    """The least length of packed rows. A short row keeps an accelerator busy no longer than starting it takes."""
    micro_batch_tokens: int
    """Tokens of a micro-batch; 0 = one row, which runs in the same kernels whatever its neighbours are."""
    micro_batch_overhead: int
    """The fixed cost of a micro-batch, counted in positions: 30 ms where 1,024 of them take 1.2 s (two cores)."""
    attention_blocks: tuple[int, int]
    """Positions of an attention block, in rows up to SHORT_ROW and in longer ones. Small blocks skip more,
    larger ones are fewer and faster products."""
    rule_chunk: int
    """Tokens of a chunk of the gated delta rule: short ones are less arithmetic, long ones larger products."""
    keeps_rule_states: bool
    """Short rows keep the states between chunks for the backward pass (`Chunks`), which saves a pass over the row and
    takes as much memory as all else that the mixer keeps: too much for a long row."""
    joins_lora: bool
    """W and B of one row are joined in one matrix (`layers/cpu.py`)."""

    layers_apart: bool
    """The layers' weights are a list, over which training and sampling unroll: under a scan each would be copied out of
    its stack before its product, and where `fsdp` cuts it, gathered while nothing is computed."""

    # sampling
    decode_steps: int
    """Steps of one quantum: a newcomer waits for one or two quanta, and on a CPU a step is long."""
    prefill_tokens: int
    """The prompt tokens of one quantum."""
    prefill_tile_tokens: int
    """Consecutive prompt tokens in one row of a prefill call, at least a page: each row reads what stands before it. 0
    = a page, as in every model with recurrent layers, whose rule takes a page as its chunk."""
    prefill_rows: tuple[int, ...]
    """The row counts of prefill calls, ascending."""
    decode_rows_max: int
    """Up to this many rows the kernels give every row the same bits in every batch, and larger batches are no faster
    per row; 0 = no limit."""
    cache_chunk_tokens: int
    """Keys of each row that one turn of the attention loop reads: few enough for a CPU's cache."""
    decodes_in_place: bool
    """`layers/cpu.py` reads pages again for each query head rather than storing what it read, and writes recurrent
    states row by row rather than storing them for a scatter."""
    own_rank_programs: bool
    """A CPU waits for adapters to be read; an accelerator is slowed by a branch in every layer."""
    least_decode_rows: int
    """Rows of the smallest decode call. On a CPU a single row would run in another matrix kernel, and round
    differently, than among others. On an accelerator it would cost more than two: the compiler turns its thin products
    into sums over products that it writes out."""
    grouped_lora: bool
    """Each adapter of a decode batch takes one product, without a branch (`layers/lora.py`); batches without
    adapters have programs of their own. At each branch an accelerator waits for the host's answer."""
    fixed_passes: bool
    """Top-k and top-p take a fixed number of passes over the vocabulary, not a search that ends when it is done."""
    flash_kernel: bool
    """Training attention runs in `layers/flash_attention.py` where the self-test found it right."""
    paged_kernel: bool
    """Attention over pages runs in `paged_kernel.py` and `prefill_kernel.py` where the self-tests found them right."""
    grouped_kernel: bool
    """Experts run in `layers/grouped_kernel.py` where the self-test found it right."""
    copies_weights: bool
    """Small models' weights are kept twice, the second copy laid out for decoding."""
    overlaps: bool
    """Two threads' programs run side by side (`streams.py`)."""

    # what is trusted
    same_sums_in_every_batch: bool
    """The compiler is asked for kernels that sum a row alike however many rows the batch has."""
    reduce_scatter: bool
    """False: gloo's reduce-scatter has returned wrong values, and no program of several processes may use one."""
    compiles_ahead: bool
    """The likeliest programs are compiled before the engine says that it is ready, even without `compile_ahead`."""
    compile_threads: int
    """How many programs are compiled at the same time."""
    keeps_executables: bool
    """Executables can be written to files and loaded again."""

    def attention_block(self, length: int) -> int:
        """Positions of a block in a row of `length`. On a CPU short rows hold short sequences; a long row exists for a
        long sequence, which skips little."""
        short, long = self.attention_blocks
        return short if length <= SHORT_ROW else long

    def rule_chunks(self, length: int) -> tuple[int, bool]:
        """`Chunks` of the gated delta rule in rows of `length`."""
        return self.rule_chunk, self.keeps_rule_states and length <= SHORT_ROW


SHORT_ROW = 1024

CPU = Platform(
    name="cpu",
    dtype="float32",
    shortest_row=32,
    micro_batch_tokens=0,
    micro_batch_overhead=25,
    attention_blocks=(64, 256),
    rule_chunk=32,
    keeps_rule_states=True,
    joins_lora=True,
    layers_apart=False,
    decode_steps=4,
    prefill_tokens=256,
    prefill_tile_tokens=0,
    prefill_rows=(4, 16, 64),
    decode_rows_max=16,
    cache_chunk_tokens=64,
    decodes_in_place=True,
    own_rank_programs=True,
    least_decode_rows=4,
    grouped_lora=False,
    fixed_passes=False,
    flash_kernel=False,
    paged_kernel=False,
    grouped_kernel=False,
    copies_weights=True,
    overlaps=True,
    same_sums_in_every_batch=True,
    reduce_scatter=False,
    compiles_ahead=False,
    compile_threads=1,
    keeps_executables=True,
)
ACCELERATOR = Platform(
    name="gpu",
    dtype="bfloat16",
    shortest_row=512,
    micro_batch_tokens=2048,
    micro_batch_overhead=64,
    attention_blocks=(512, 512),
    rule_chunk=64,
    keeps_rule_states=False,
    joins_lora=False,
    layers_apart=True,
    decode_steps=16,
    prefill_tokens=1024,
    prefill_tile_tokens=128,
    prefill_rows=(1, 4, 8),
    decode_rows_max=0,
    cache_chunk_tokens=512,
    decodes_in_place=False,
    own_rank_programs=False,
    least_decode_rows=2,
    grouped_lora=True,
    fixed_passes=True,
    flash_kernel=True,
    paged_kernel=True,
    grouped_kernel=True,
    copies_weights=False,
    overlaps=False,
    same_sums_in_every_batch=False,
    reduce_scatter=True,
    compiles_ahead=True,
    compile_threads=4,
    keeps_executables=False,
)


def of(name: str) -> Platform:
    """The column of a backend, by JAX's name for it."""
    return CPU if name == CPU.name else replace(ACCELERATOR, name=name)


def current() -> Platform:
    """Where JAX runs here. This starts the backend but joins no mesh: call it after `jax.distributed.initialize`."""
    return of(jax.default_backend())


def device_memory() -> tuple[int, int]:
    """(bytes in use, bytes that it may use or 0) of the first device here; on a CPU, of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats.get("bytes_in_use", 0), stats.get("bytes_limit", 0)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), 0
    except OSError:  # no Linux
        return 0, 0


def available_memory() -> int:
    """Bytes that this host, and this process's control group, have left; 0 where nobody says."""
    left: list[int] = []
    with contextlib.suppress(OSError, IndexError, ValueError):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        left.append(1024 * int(fields.get("MemAvailable", "").split()[0]))
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        left.append(max(1, limit - int(Path("/sys/fs/cgroup/memory.current").read_text())))
    return min(left, default=0)
