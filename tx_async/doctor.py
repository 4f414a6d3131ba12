"""`tx-async doctor`: looks for what would keep a server from running here, and says it in plain words.

Each check returns a `Finding`, and asks what `serve` asks at its start, with the same code. None changes anything
except that the database is opened (and so migrated), as `serve` would do. JAX runs in a process of its own: a broken
accelerator driver may take its process down.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tx_async import base_model, health
from tx_async.config import ServerConfig
from tx_async.engine.devices import GPU_BYTES, NOT_HERE, in_mesh, usable
from tx_async.errors import ConfigError, NotFound, TxError
from tx_async.health import Finding, size
from tx_async.identity import identity_of, with_base, with_storage
from tx_async.private import check_writable
from tx_async.serve import check_address, check_settings
from tx_async.storage.local import INCOMING
from tx_async.storage.store import Store, local_folder
from tx_async.tracing import open_tracing
from tx_async.wire.records import IdentityRecord, Record

JAX_S = 120
DISK_BYTES_MIN = 2 * 2**30
SHARED_MEMORY = Path("/dev/shm")

_ASK_JAX = """
import json, sys, jax
from tx_async.engine import kernel_uses, platform
devices = jax.devices()
x = jax.numpy.ones((64, 64)) @ jax.numpy.ones((64, 64))
uses = kernel_uses.of_folder(sys.argv[1], platform.current()) if sys.argv[1] else ()
print(json.dumps([jax.__version__, devices[0].platform, [d.device_kind for d in devices], float(x[0, 0]), uses]))
"""


def run_plan(config: ServerConfig, device: str, devices: int) -> int:
    """Print how the memory of each of `devices` devices of that name would be used, from the base model's `config.json`
    alone: it needs neither weights nor such a device nor its packages. Returns 2 when it does not fit.

    devices: 0 = as many as the parallel sizes in backend_config ask for. Raises `ConfigError`, `BaseModelError`.
    """
    planned, wanted = _plan(config, device, devices), in_mesh(config.backend_config)
    print(f"{device}, {devices or wanted} × {size(GPU_BYTES[device])}; each device:")
    print("\n".join(planned.lines()))
    if devices and wanted > devices:
        print(f"backend_config asks for {wanted} devices, there are {devices}: lower its parallel sizes.")
    if devices > wanted and planned.fits:
        print(
            f"{devices - wanted} devices would be idle: raise tensor_parallel_size or another size in backend_config."
        )
    return 0 if planned.fits and not 0 < devices < wanted else 2


def _plan(config: ServerConfig, device: str, devices: int) -> Any:
    if device not in GPU_BYTES:
        raise ConfigError(f"--device {device} is not known; known: {', '.join(GPU_BYTES)}.")
    if not config.base_model:
        raise ConfigError("Nothing to plan for: set TX_BASE_MODEL or --base-model to a folder or hub name.")
    from tx_async.engine import memory_plan, platform
    from tx_async.models.load import model_of

    served = config.backend_config.max_context_length
    model = model_of(base_model.resolve(config.base_model), served)
    at_first = memory_plan.with_slots_for(config.backend_config)
    return memory_plan.plan(model, at_first, platform.ACCELERATOR, usable(device), devices)


def run(config: ServerConfig) -> int:
    """Print the findings. Returns 1 when one is a problem."""
    checks: dict[str, Callable[[ServerConfig], Finding]] = {
        "python": _python,
        "jax": _jax,
        "shared memory": _shared_memory,
        "disk": _disk,
        "compilation cache": _compilation_cache,
        "settings": _settings,
        "address": _address,
        "database": _database,
        "storage": _storage,
        "memory": _memory,
        "base model": _base_model,
        "identity": _identity,
    }
    problems = 0
    for name, check in checks.items():
        finding = check(config)
        problems += finding.state == "problem"
        print(f"{finding.state:8} {name}: {finding.text}", flush=True)
    print("Nothing stands in the way." if not problems else f"{problems} to solve first.")
    return 1 if problems else 0


def _python(_: ServerConfig) -> Finding:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if platform.system() != "Linux":
        return Finding("warning", f"{text}: only Linux is tested")
    return Finding("ok", text)


def _jax(config: ServerConfig) -> Finding:
    folder = ""  # what is wrong with the base model is another finding
    with contextlib.suppress(TxError):
        folder = str(base_model.resolve(config.base_model)) if config.base_model else ""
    command = [sys.executable, "-c", _ASK_JAX, folder]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=JAX_S)
    except subprocess.TimeoutExpired:
        return Finding("problem", f"lists no devices within {JAX_S} s: does another process hold the accelerator?")
    if process.returncode:
        last_line = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return Finding("problem", f"cannot run: {last_line}")
    version, device_platform, kinds, product, uses = json.loads(process.stdout.splitlines()[-1])
    text = f"{version}, platform {device_platform}: {', '.join(sorted(set(kinds)))} × {len(kinds)}"
    if product != 64:
        return Finding("problem", f"{text}, but a 64 × 64 product of ones is {product}, not 64")
    if device_platform not in ("gpu", "tpu") and shutil.which("nvidia-smi"):
        return Finding("warning", f"{text}; there is an NVIDIA GPU: pip install 'tx-async[gpu]'")
    return _with_kernels(text, uses) if device_platform == "gpu" else Finding("ok", text)


def _with_kernels(text: str, uses: list[tuple[str, str, str]]) -> Finding:
    """uses: (task, kernel that runs it or "plain", which layers run in the plain version and why)."""
    text = "; ".join((text, *(f"{task}: {kernel}{why and f' ({why})'}" for task, kernel, why in uses)))
    if any(why == NOT_HERE for _, _, why in uses):
        return Finding("warning", f"{text}; what failed is slower")
    return Finding("ok", text)


def _shared_memory(config: ServerConfig) -> Finding:
    if not SHARED_MEMORY.is_dir():
        return Finding("warning", f"{SHARED_MEMORY} does not exist: tensors travel as frames, which is slower")
    needed = 2 * config.shared_memory_bytes * max(1, config.local_workers)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        text = f"{size(free)} free, up to {size(needed)} wanted: enlarge {SHARED_MEMORY}, or lower shared_memory_bytes"
        return Finding("problem", text)
    return Finding("ok", f"{size(free)} free in {SHARED_MEMORY}, up to {size(needed)} wanted")


def _disk(config: ServerConfig) -> Finding:
    folder = config.data_path.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        check_writable(config.data_path, "data_dir")
    except TxError as error:
        return Finding("problem", error.message)
    free = shutil.disk_usage(folder).free
    text = f"{size(free)} free for {config.data_path} (data_dir)"
    return Finding("ok" if free >= DISK_BYTES_MIN else "warning", text)


def _compilation_cache(config: ServerConfig) -> Finding:
    folder = Path(config.resolved_compilation_cache_dir)
    if not config.local_workers:
        return Finding("ok", "there are no local workers; each of the others uses this folder of its own host")
    try:
        check_writable(folder, "compilation_cache_dir")
    except TxError as error:
        return Finding("problem", error.message)
    return Finding("ok", f"{folder} can be written")


def _settings(config: ServerConfig) -> Finding:
    try:
        check_settings(config)
        if tracing := open_tracing(config.otlp_endpoint):
            tracing.shutdown()
    except TxError as error:
        return Finding("problem", error.message)
    return Finding("ok", "keys" if config.api_keys_file else "no keys, loopback only")


def _address(config: ServerConfig) -> Finding:
    try:
        check_address(config)
    except TxError as error:
        return Finding("problem", error.message)
    return Finding("ok", f"{config.host}:{config.port} is free")


def _database(config: ServerConfig) -> Finding:
    url = config.resolved_database_url
    shown = url if url.startswith("sqlite") else url.partition("@")[2]
    if (file := config.sqlite_file) and not file.exists():
        try:
            check_writable(file.parent, "The folder of database_url," if config.database_url else "data_dir")
        except TxError as error:
            return Finding("problem", error.message)
        return Finding("ok", f"{shown} will be made at the first start")
    try:
        return Finding("ok", f"{shown} has the newest schema and {len(_records(config))} records")
    except (TxError, OSError) as error:
        return Finding("problem", str(error))


def _records(config: ServerConfig) -> list[Record]:
    """What the journal holds; nothing where there is none yet. Raises `TxError`, `OSError`."""
    from tx_async.journal.factory import open_journal

    async def load() -> list[Record]:
        journal = open_journal(config)
        records = await journal.open()
        await journal.close()
        return records

    file = config.sqlite_file
    return [] if file and not file.exists() else asyncio.run(load())


def _identity(config: ServerConfig) -> Finding:
    """Whether journal, base model and storage belong together."""
    try:
        known = identity_of(_records(config))
        base = base_model.read(config.base_model, config.base_model_name, config.backend_config)
    except (TxError, OSError):
        return Finding("warning", "the database or the base model cannot be asked")
    try:
        with_base(known, base, config.adopt, time.time())
        return health.within(health.PROBE_S, lambda: _stored_here(config, known))
    except TxError as error:
        return Finding("problem", error.message)


def _stored_here(config: ServerConfig, known: IdentityRecord) -> Finding:
    if known.storage is None or config.adopt:
        return Finding("ok", "the journal takes the base model and the storage that are named")
    store = Store(config.resolved_checkpoints_base, known.storage.storage_id)
    try:
        with_storage(known, store.identity_sync(), store.address, config.adopt)
    except NotFound:
        return Finding("problem", f"{store.address} is empty, or not mounted: the server would wait for this journal's")
    except TxError as error:
        return Finding("problem", error.message)
    return Finding("ok", "the journal knows the base model and the storage")


def _base_model(config: ServerConfig) -> Finding:
    if not config.base_model:
        return Finding("warning", "none is set; `serve` needs --base-model")
    try:
        info = base_model.read(config.base_model, config.base_model_name, config.backend_config)
    except TxError as error:
        return Finding("problem", error.message)
    text = f"{info.name}, {info.architecture}, vocabulary {info.vocab_size}, context {info.max_context_length}"
    if problem := _loader_says(info.path):
        return Finding("problem", problem)
    if info.tokenizer_problem:
        return Finding("warning", f"{text}; requests with stop strings will be refused: {info.tokenizer_problem}")
    return Finding("ok", text)


def _loader_says(folder: str) -> str:
    """What a worker would find wrong with the folder; "" when nothing is."""
    if not any(Path(folder).glob("*.safetensors")):
        return ""  # a hub name whose weights the worker will fetch
    command = [sys.executable, "-m", "tx_async.models.check", folder]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=JAX_S, env=environment)
    except subprocess.TimeoutExpired:
        return f"{folder}: its files could not be checked within {JAX_S} s"
    if not process.returncode:
        return ""
    said = (process.stdout or process.stderr).strip().splitlines()
    return said[-1] if said else f"the check of {folder} ended with exit code {process.returncode}"


def _storage(config: ServerConfig) -> Finding:
    folder = local_folder(config.resolved_checkpoints_base)
    try:
        if folder is not None:
            check_writable(folder, "checkpoints_base")
            if not folder.exists():
                return Finding("ok", f"{folder} (checkpoints_base) will be made at the first start")
        store = Store(config.resolved_checkpoints_base)
    except (TxError, OSError) as error:
        return Finding("problem", str(error))
    is_new = folder is not None and not (folder / INCOMING).exists()
    try:
        return health.within(health.PROBE_S, lambda: health.probe_storage(store))
    finally:
        if folder is not None and is_new:
            with contextlib.suppress(OSError):  # it was not made, or a server that starts just now uses it
                (folder / INCOMING).rmdir()


def _memory(_: ServerConfig) -> Finding:
    return health.memory()
