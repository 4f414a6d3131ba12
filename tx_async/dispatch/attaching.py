"""A worker's first message and the answer to it: whom the server refuses, and what an attached process gets and is
told.

This module knows no socket; `router.py` knows who is attached already.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from tx_async.config import ServerConfig
from tx_async.dispatch.groups import Group, Member, differences_of
from tx_async.dispatch.runtime import RuntimeDirectory
from tx_async.dispatch.security import tokens_equal
from tx_async.dispatch.shared_memory import ArenaReader, ArenaWriter, create_arena
from tx_async.errors import ConfigError
from tx_async.wire.worker import PROTOCOL_VERSION, EngineInfo, Hello, StorageProbe, Welcome

LEASE_HEARTBEATS_MIN = 3
WORKER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def check_lease(config: ServerConfig) -> None:
    """Raises `ConfigError` when a worker could lose its lease between two heartbeats."""
    if config.worker_lease_ms < LEASE_HEARTBEATS_MIN * config.worker_heartbeat_interval_ms:
        raise ConfigError(
            f"worker_lease_ms ({config.worker_lease_ms}) must be at least {LEASE_HEARTBEATS_MIN} times "
            f"worker_heartbeat_interval_ms ({config.worker_heartbeat_interval_ms})."
        )


def why_refused(hello: Hello, config: ServerConfig, is_stranger: bool) -> str | None:
    """What is wrong with a worker, whoever else is attached; None when nothing is. A stranger came over the network."""
    if hello.protocol_version != PROTOCOL_VERSION:
        return (
            f"This worker speaks protocol version {hello.protocol_version}, the server {PROTOCOL_VERSION}: "
            f"install the same release of tx-async on both."
        )
    if is_stranger and not tokens_equal(hello.token, config.worker_token):
        return "The token is wrong."
    if not WORKER_NAME.fullmatch(hello.name):
        return "A worker's name has 1 to 64 letters, digits, dots, dashes and underscores."
    if not hello.capabilities:
        return "This worker has no capability."
    num_processes = num_processes_of(hello, config)
    if hello.num_processes not in (0, num_processes) and "train" in hello.capabilities:
        return (
            f"This worker was started as one of {hello.num_processes} processes, but the server's backend_config "
            f"says num_processes {num_processes}: leave that out, or start that many."
        )
    if not 0 <= hello.process_id < num_processes:
        return f"There is no process {hello.process_id}: worker {hello.name} has {num_processes}, counted from 0."
    return None


def why_no_member(hello: Hello, group: Group, config: ServerConfig) -> str | None:
    """Why a process cannot join those of its worker that are attached already; None when it can."""
    num_processes = num_processes_of(hello, config)
    if group.num_processes != num_processes:
        return (
            f"Worker {hello.name} has {group.num_processes} processes; this one was started as one of {num_processes}."
        )
    if group.capabilities != hello.capabilities:
        return f"Worker {hello.name} has other capabilities: {', '.join(sorted(group.capabilities))}."
    return None


def num_processes_of(hello: Hello, config: ServerConfig) -> int:
    """A worker that trains is a whole mesh; one that only samples is one process."""
    if "train" not in hello.capabilities:
        return 1
    configured = config.backend_config.num_processes
    return configured if configured > 1 else max(1, hello.num_processes)


def new_group(hello: Hello, config: ServerConfig, lora_rank: int = 0) -> Group:
    """Make the group that a worker's first process joins. lora_rank: what its slots must hold."""
    return Group(hello.name, num_processes_of(hello, config), hello.capabilities, hello.coordinator_address, lora_rank)


def make_arenas(group: Group, member: Member, runtime: RuntimeDirectory, num_bytes: int) -> None:
    """Create shared memory for a process on this host; none when `num_bytes` is 0."""
    if num_bytes <= 0:
        return
    if group.inbox is None:
        path = runtime.new_arena_path()
        create_arena(path, num_bytes)
        group.inbox = ArenaWriter(path)
    outbox = runtime.new_arena_path()
    create_arena(outbox, num_bytes)
    member.outbox_path = str(outbox)
    member.outbox = ArenaReader(outbox)


def welcome(
    group: Group, member: Member, config: ServerConfig, storage_probe: StorageProbe | None, storage_id: str
) -> Welcome:
    engine = config.backend_config
    if not engine.compilation_cache_dir:
        engine = msgspec.structs.replace(engine, compilation_cache_dir=config.resolved_compilation_cache_dir)
    engine = msgspec.structs.replace(
        engine,
        num_processes=group.num_processes if "train" in group.capabilities else engine.num_processes,
        coordinator_address=engine.coordinator_address or group.coordinator_address,
    )
    return Welcome(
        base_model=config.base_model,
        engine=engine,
        checkpoints_base=config.resolved_checkpoints_base,
        process_id=member.hello.process_id,
        heartbeat_interval_ms=config.worker_heartbeat_interval_ms,
        lease_ms=config.worker_lease_ms,
        inbox=group.inbox.path if group.inbox and member.outbox_path else "",
        outbox=member.outbox_path,
        storage_probe=storage_probe,
        storage_id=storage_id,
        lora_rank=group.lora_rank,
    )


def why_unfit(infos: Sequence[EngineInfo], base_fingerprint: str) -> str | None:
    """What is wrong with the engines that a group's processes have built; None when nothing is."""
    if differences := differences_of(infos):
        return f"its processes built different engines: {differences}"
    loaded = infos[0].base_model_digest
    if loaded and base_fingerprint and loaded != base_fingerprint:
        return f"it loaded another base model ({loaded}) than the server's {base_fingerprint}"
    return None


def describe(info: EngineInfo) -> str:
    """What an operator wants to know about a worker, in a few words."""
    can = f"{info.num_training_slots} training slots, " if info.num_training_slots else ""
    devices = f"{info.num_devices} {info.platform} device{'s' * (info.num_devices > 1)}"
    return (
        f"{devices}, {info.dtype}, context {info.max_context_length}, {can}{info.num_sequences_max} sequences at once"
    )
