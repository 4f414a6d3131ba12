"""The numbers that the router reports to an operator."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from msgspec import Struct

from tx_async.dispatch.groups import Group
from tx_async.metrics import Counter, Gauge
from tx_async.wire.worker import EngineInfo, Heartbeat


class RouterStatistics(Struct, frozen=True, kw_only=True):
    workers_ready: Gauge
    """Workers that take commands; the processes of a mesh are one."""
    workers_attaching: Gauge
    """Workers that load their weights or wait for others of their mesh."""
    workers_lost: Counter
    """Ready workers that went away."""
    workers_refused: Counter
    """Attempts to attach that were refused."""
    commands_in_flight: Gauge
    """Commands sent and not answered."""
    commands_sent: Counter
    """Commands sent to workers."""
    results_received: Counter
    """Answers from workers."""
    shared_bytes: Counter
    """Bytes of tensors that went through shared memory."""
    frame_bytes: Counter
    """Bytes of tensors that went through ZeroMQ."""
    arena_full: Counter
    """Tensors that found no room in shared memory."""
    arena_used_bytes: Gauge
    """Shared memory in use for tensors that are on their way."""
    malformed_messages: Counter
    """Messages that could not be read."""
    kernels_plain: Gauge
    """Tasks that have a kernel of their own but run in the plain version on the attached workers."""
    memory_weights_bytes: Gauge
    """Memory planned on each device of the attached workers for the base model; 0 without a plan, as on a CPU."""
    memory_slots_bytes: Gauge
    """Memory planned for training slots and samplers."""
    memory_temporaries_bytes: Gauge
    """Memory planned for the temporaries of the largest program."""
    memory_kv_cache_bytes: Gauge
    """Memory planned for keys and values of sequences and cached prefixes."""
    compilations: Gauge
    """Programs that the attached workers have compiled or loaded from the compilation cache."""

    def __str__(self) -> str:
        attached = f"{self.workers_ready:.0f} ready, {self.workers_attaching:.0f} attaching"
        commands = f"{self.commands_in_flight:.0f} in flight, {self.commands_sent:.0f} sent"
        data = f"{self.shared_bytes:.0f} shared, {self.frame_bytes:.0f} in frames"
        return f"[Workers: {attached}, {self.workers_lost:.0f} lost | Commands: {commands} | Bytes: {data}]"


class WorkerStatistics(Struct, frozen=True, kw_only=True):
    """What workers report about themselves, for the server as a whole."""

    compilations: Counter
    """Programs that workers have compiled or loaded from the compilation cache; those of lost workers stay counted."""
    compile_seconds: Counter
    """Time that workers took to compile or load them."""
    workers_lost: Counter
    """Ready workers that went away."""
    worker_lease_age_seconds: Gauge
    """How long the most silent of the attached processes has been silent."""
    worker_lease_seconds: Gauge
    """How long a process may be silent before it is lost (worker_lease_ms)."""
    device_memory_used_bytes: Gauge
    """Memory in use on the fullest device; on a CPU the worker process's own memory."""
    device_memory_limit_bytes: Gauge
    """Memory that the fullest device has for the worker; 0 where it does not say, as on a CPU."""
    device_memory_planned_bytes: Gauge
    """Sum of the plan for a device's memory; 0 without a plan, as on a CPU."""


class Totals(Struct):
    """Totals over all workers, including those that are gone."""

    compilations: int = 0
    compile_s: float = 0.0
    workers_lost: int = 0

    def hear(self, before: Heartbeat, now: Heartbeat) -> None:
        """Add what has changed between two heartbeats of one process."""
        self.compilations += max(0, now.num_compilations - before.num_compilations)
        self.compile_s += max(0.0, now.compile_s - before.compile_s)


def worker_statistics_of(groups: Collection[Group], totals: Totals, now: float, lease_s: float) -> WorkerStatistics:
    """now: monotonic seconds."""
    members = [member for group in groups for member in group.members.values()]
    fullest = max((member.vitals for member in members), key=lambda vitals: vitals.device_bytes, default=Heartbeat())
    plans = [sum(part.num_bytes for part in member.info.memory) for member in members if member.info]
    return WorkerStatistics(
        compilations=totals.compilations,
        compile_seconds=totals.compile_s,
        workers_lost=totals.workers_lost,
        worker_lease_age_seconds=max((now - member.last_heard for member in members), default=0.0),
        worker_lease_seconds=lease_s,
        device_memory_used_bytes=fullest.device_bytes,
        device_memory_limit_bytes=fullest.device_bytes_max,
        device_memory_planned_bytes=max(plans, default=0),
    )


def _planned_memory(infos: Sequence[EngineInfo]) -> dict[str, float]:
    of = lambda *names: max(  # noqa: E731
        (sum(part.num_bytes for part in info.memory if part.name in names) for info in infos), default=0
    )
    return {
        "kernels_plain": sum(runs == "plain" for info in infos for _, runs in info.kernels),
        "memory_weights_bytes": of("weights"),
        "memory_slots_bytes": of("training slots", "samplers"),
        "memory_temporaries_bytes": of("temporaries"),
        "memory_kv_cache_bytes": of("KV cache"),
    }


def statistics_of(groups: Collection[Group], counts: Mapping[str, float]) -> RouterStatistics:
    """counts: by name, the numbers that the groups do not hold."""
    members = [member for group in groups for member in group.members.values()]
    return RouterStatistics(
        **counts,
        **_planned_memory([member.info for member in members if member.info]),
        workers_ready=sum(group.is_ready for group in groups),
        workers_attaching=sum(not group.is_ready for group in groups),
        commands_in_flight=sum(len(group.in_flight) for group in groups),
        arena_used_bytes=sum(group.inbox.used_bytes for group in groups if group.inbox),
        compilations=sum(member.vitals.num_compilations for member in members),
    )
