"""Programs: each compiled once, for shapes that are known when the engine starts, and counted.

A `Program` holds its executable itself. Called with any other shape it fails instead of compiling another one, so "no
input compiles anything new" holds by construction; `CompilationCounter` counts what XLA compiled in this process,
whoever asked for it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from jax._src import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled, Lowered

from tx_async.engine import platform
from tx_async.engine.executables import COMPILE_EVENT, Executables
from tx_async.private import make_writable_folder

CACHE_BYTES_MAX = 4 * 2**30
MAYBE_INCOMPLETE = 64
"""The newest entries of a cache are read at a start: one may be what a killed process was writing."""
SLOW_S = 10.0
"""A program that takes this long is worth a line of the log."""

log = logging.getLogger(__name__)


def use_cache(folder: str) -> None:
    """Keep compiled programs in `folder`, however short their compilation was; "" leaves JAX's own configuration.

    Its size is bounded here, once a start. Were JAX told the limit, it would read the times of all entries for every
    program that it adds, under a lock between processes: seconds for each in a cache of thousands.

    Call before the first jit. Raises `ConfigError` where the folder cannot be made or written.
    """
    if folder:
        make_writable_folder(Path(folder), "compilation_cache_dir")
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_compilation_cache_max_size", -1)
        _tidy(Path(folder), CACHE_BYTES_MAX)


def keep_cache_on_every_host() -> None:
    """JAX lets process 0 alone write its cache, for file systems that many hosts share. Here every host has a folder
    of its own, and a process that compiled everything anew would keep its mesh waiting at each restart.

    Call once the devices are known: until then JAX looks there for this process's place among the others.
    """
    from jax._src import distributed

    distributed.global_state.process_id = 0


def _tidy(folder: Path, bytes_max: int) -> None:
    """Remove the entries whose last use is longest ago, over `bytes_max`, and those of writers that were killed."""
    entries: list[tuple[float, int, Path]] = []
    for entry in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process tidies, too
            stat = entry.stat()
            entries.append((max(stat.st_atime, stat.st_mtime), stat.st_size, entry))
    total = 0
    for age, (_, num_bytes, entry) in enumerate(sorted(entries, reverse=True)):
        total += num_bytes
        if total > bytes_max or (age < MAYBE_INCOMPLETE and not _is_complete(entry)):
            entry.unlink(missing_ok=True)


def _is_complete(entry: Path) -> bool:
    """Half an entry would stay for good: JAX reports it, compiles anew, and does not replace it."""
    try:
        compilation_cache.decompress_executable(entry.read_bytes())
    except Exception:  # of whichever library JAX compresses with
        return False
    return True


class CompilationCounter:
    """Programs that XLA compiled, or JAX loaded from its cache, since this counter was made."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs


class Program:
    """A function, compiled at its first call or by `compile`, for the one set of shapes in `arguments`."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        donate: tuple[int, ...] = (),
        out_shardings: Any = None,
        options: dict[str, Any] | None = None,
    ):
        """arguments: arrays or ShapeDtypeStructs, one per parameter. donate: indices of those whose memory is reused.

        out_shardings: as in `jax.jit`; None lets the compiler choose, which on a mesh is not what the next call
        expects. options: compiler options, by XLA's names. Where one argument lies on a mesh, every host array among
        them is whole on each of its devices.
        """
        self.name = name
        #: where the executable of an earlier process may lie; None = nowhere
        self.executables: Executables | None = None
        self._function = jax.jit(function, donate_argnums=donate, out_shardings=out_shardings)
        self.options = options
        self._shapes = _shapes(tuple(arguments))
        self._compiled: Compiled | None = None
        self._bound, self._decides = function, (self._shapes, donate, out_shardings, options)

    def __repr__(self) -> str:
        return f"<Program {self.name}: {'compiled' if self._compiled else 'not compiled yet'}>"

    def compile(self) -> None:
        if self._compiled is None:
            kept, began = self.executables, time.monotonic()
            self._compiled = kept.get(self._bound, self._decides, self._make) if kept else self._make()
            seconds = time.monotonic() - began
            level = logging.INFO if seconds >= SLOW_S else logging.DEBUG
            log.log(level, "The program %s was compiled or loaded in %.1f s", self.name, seconds)

    def lower(self) -> Lowered:
        return self._function.lower(*self._shapes)

    def _make(self) -> Compiled:
        compiled = self.lower().compile(self.options)
        _refuse_untrusted(self.name, compiled)
        return compiled

    def __call__(self, *arguments: Any) -> Any:
        self.compile()
        assert self._compiled is not None
        return self._compiled(*arguments)


def _shapes(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    shardings = (leaf.sharding for leaf in jax.tree.leaves(arguments) if not isinstance(leaf, (np.ndarray, np.generic)))
    on_mesh = next((sharding for sharding in shardings if isinstance(sharding, NamedSharding)), None)
    whole = NamedSharding(on_mesh.mesh, PartitionSpec()) if on_mesh else None

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        own = getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole if own is None else own)

    return jax.tree.map(shape, arguments)


def _refuse_untrusted(name: str, compiled: Any) -> None:
    """gloo's reduce-scatter has returned wrong values: no program of several CPU processes may use one."""
    if jax.process_count() > 1 and not platform.current().reduce_scatter:
        assert "reduce-scatter(" not in compiled.as_text(), f"{name} uses a reduce-scatter"


@cache
def row_independent() -> dict[str, Any] | None:
    """Compiler options with which a CPU sums a row the same way however many rows the batch has.

    By default, XLA hands larger reductions to a library that adds in another order. None where there is no such option.
    """
    options: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
    try:
        jax.jit(jnp.negative).lower(jax.ShapeDtypeStruct((), jnp.float32)).compile(options)
    except jax.errors.JaxRuntimeError:
        return None
    return options
