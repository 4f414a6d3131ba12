"""Executables as files: what an earlier process compiled is loaded again, without tracing or lowering it.

JAX's own cache (`compilation.use_cache`) finds a program by what it lowers to, which takes a second to compute where
the model has many layers. Here a program's key is all that decides what it lowers and compiles to: the sources of this
package, the versions of the compilers, JAX's settings and the processor; and the program's own function with what is
bound to it, its shapes and the compiler's options. A program whose file cannot be found, read or loaded is compiled.

An executable that may have come out of JAX's cache is not kept here: a CPU executable that was serialized, loaded and
serialized again has lost its functions (JAX 0.10, 0.12), and fails only when it runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
from jax.experimental import serialize_executable
from jax.stages import Compiled

import tx_async
from tx_async.engine.platform import current
from tx_async.private import make_folder

BYTES_MAX = 2**30
"""At start, the least recently used files are removed until the others take no more than this."""
ABANDONED_S = 3600
"""A file that is still incomplete after this time belongs to a process that was killed."""
COMPILED_BY = ("jax", "jaxlib", "numpy", "ml_dtypes")
HIT_EVENT = "/jax/compilation_cache/cache_hits"
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
DIGEST_BYTES = hashlib.sha256().digest_size

log = logging.getLogger(__name__)


class _Compilations(threading.local):
    """Those of one thread: several threads compile at the same time. JAX reports none where it already has the
    executable in memory, and nobody knows whether that one was loaded."""

    count = 0
    """By XLA, or out of JAX's cache."""
    loaded = 0
    """Out of JAX's cache."""


class Executables:
    """One folder of executables. Any number of processes may use it at once.

    A file is code that this process will run: whoever may write to the folder may do whatever the server may do.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._environment = _environment()
        self._compilations = _Compilations()
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        make_folder(folder)
        self._tidy()

    def __repr__(self) -> str:
        return f"<Executables in {self._folder}>"

    def get(self, function: Any, decides: Any, compile: Callable[[], Compiled]) -> Compiled:
        """decides: what else the executable depends on; its repr must tell all of it. compile: makes an executable that
        is not here."""
        key = self._key(function, decides)
        if key is None:
            return compile()
        path = self._folder / f"{key}.executable"
        found = _load(path)
        if found is None:
            of_thread = self._compilations
            count, loaded = of_thread.count, of_thread.loaded
            found = compile()
            if of_thread.count > count and of_thread.loaded == loaded:
                self._save(path, found)
        return found

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        if event == HIT_EVENT:
            self._compilations.loaded += 1

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT:
            self._compilations.count += 1

    def _key(self, function: Any, decides: Any) -> str | None:
        """The file's key; None where `function` is bound to an object without a value of its own, so that nothing tells
        what it does."""
        try:
            bound = pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError):
            return None
        return hashlib.sha256(self._environment + bound + repr(decides).encode()).hexdigest()

    def _save(self, path: Path, compiled: Compiled) -> None:
        """A failure costs only the next start's time, so it is logged as a warning."""
        try:
            stored = pickle.dumps(serialize_executable.serialize(compiled))
            self._write(path, hashlib.sha256(stored).digest() + stored)
        except Exception as error:  # a full disk, or a program that this JAX cannot serialize
            log.warning("%s cannot be kept: %s", path, error)

    def _write(self, path: Path, content: bytes) -> None:
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".incomplete", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    def _tidy(self) -> None:
        now = time.time()
        for path, stat in self._files("*.incomplete"):
            if now - stat.st_mtime > ABANDONED_S:
                path.unlink(missing_ok=True)
        left = BYTES_MAX
        for path, stat in sorted(self._files("*.executable"), key=lambda file: -file[1].st_mtime):
            left -= stat.st_size
            if left < 0:
                path.unlink(missing_ok=True)

    def _files(self, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # another process tidies up, too
                yield path, path.stat()


def _load(path: Path) -> Compiled | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, stored = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(stored).digest() != digest:
        log.warning("%s is damaged: it is compiled again", path)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    try:
        return serialize_executable.deserialize_and_load(*pickle.loads(stored))
    except Exception as error:  # whatever is wrong with the file, the program can be compiled
        log.warning("%s cannot be loaded, so it is compiled again: %s", path, error)
        return None


def _environment() -> bytes:
    """A digest of all that decides, beside a program itself, what it compiles to here."""
    digest = hashlib.sha256()
    package = Path(tx_async.__file__).parent
    for source in sorted(package.rglob("*.py")):
        digest.update(f"\n{source.relative_to(package)}\n".encode())
        digest.update(source.read_bytes())
    facts = (
        sys.version,
        [(name, version(name)) for name in COMPILED_BY],
        sorted(jax.config.values.items()),
        os.environ.get("XLA_FLAGS"),
        current().name,
        platform.platform(),
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        _processor(),
    )
    digest.update(repr(facts).encode())
    return digest.digest()


def _processor() -> list[str]:
    """The processor's name and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return [platform.processor()]
    return [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))]
