"""What the router tells an operator in numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec import Struct

from tx_async.dispatch.groups import Group
from tx_async.metrics import Counter, Gauge


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
    """Answers of workers."""
    shared_bytes: Counter
    """Tensors that went through shared memory."""
    frame_bytes: Counter
    """Tensors that went through ZeroMQ."""
    arena_full: Counter
    """Tensors that found no room in shared memory."""
    arena_used_bytes: Gauge
    """Shared memory in use for tensors that are on their way."""
    malformed_messages: Counter
    """Messages that could not be read."""
    kernels_plain: Gauge
    """Tasks that the plain version runs on the attached workers, of those that have a kernel of their own."""
    memory_weights_bytes: Gauge
    """Planned on each device of the attached workers for the base model; 0 where no plan was made, as on a CPU."""
    memory_slots_bytes: Gauge
    """Planned for training slots and samplers."""
    memory_temporaries_bytes: Gauge
    """Planned for the temporaries of the largest program."""
    memory_kv_cache_bytes: Gauge
    """Planned for keys and values of sequences and cached prefixes."""
    compilations: Gauge
    """Programs that the attached workers have compiled or loaded from the compilation cache."""

    def __str__(self) -> str:
        attached = f"{self.workers_ready:.0f} ready, {self.workers_attaching:.0f} attaching"
        commands = f"{self.commands_in_flight:.0f} in flight, {self.commands_sent:.0f} sent"
        data = f"{self.shared_bytes:.0f} shared, {self.frame_bytes:.0f} in frames"
        return f"[Workers: {attached}, {self.workers_lost:.0f} lost | Commands: {commands} | Bytes: {data}]"


def statistics_of(groups: Collection[Group], counts: Mapping[str, float]) -> RouterStatistics:
    """counts: what the groups do not tell, by name."""
    return RouterStatistics(
        **counts,
        workers_ready=sum(group.is_ready for group in groups),
        workers_attaching=sum(not group.is_ready for group in groups),
        commands_in_flight=sum(len(group.in_flight) for group in groups),
        arena_used_bytes=sum(group.inbox.used_bytes for group in groups if group.inbox),
        compilations=sum(member.num_compilations for group in groups for member in group.members.values()),
    )
