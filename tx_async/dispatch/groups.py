"""Worker groups: which processes make up a worker, and which commands they have not all answered yet.

A group is one mesh: `num_processes` processes that receive the same numbered commands. Everything here is synchronous
and knows no socket; `router.py` moves the bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from tx_async.dispatch.frames import Block
from tx_async.dispatch.shared_memory import ArenaReader, ArenaWriter
from tx_async.wire.worker import (
    Capability,
    Command,
    CommandFailed,
    CommandFinished,
    EngineInfo,
    Heartbeat,
    Hello,
    Progress,
    SaveAdapter,
)

logger = logging.getLogger(__name__)

SILENT_HEARTBEATS = 5
"""A process that has missed so many is silent."""

Outcome = CommandFinished | CommandFailed


@dataclass(eq=False)
class Member:
    """One attached process."""

    identity: bytes
    transport: Literal["ipc", "tcp"]
    hello: Hello
    last_heard: float
    """Monotonic seconds."""
    #: where the tensors of its results are; None when they come as frames
    outbox: ArenaReader | None = None
    outbox_path: str = ""
    #: blocks of the outbox that the server has read, to be told with the next message
    released: list[int] = field(default_factory=list)
    progress: Progress | None = None
    info: EngineInfo | None = None
    is_silent: bool = False
    #: what its newest heartbeat said
    vitals: Heartbeat = field(default_factory=Heartbeat)

    @property
    def peer(self) -> tuple[str, bytes]:
        """The connection by which it is reached."""
        return self.transport, self.identity

    def notice_silence(self, now: float, interval_s: float, lease_s: float) -> None:
        """Say in the log that it has fallen silent, once, long before it is lost."""
        limit_s = min(SILENT_HEARTBEATS * interval_s, lease_s / 2)
        was_silent, self.is_silent = self.is_silent, now - self.last_heard > limit_s
        if self.is_silent and not was_silent:
            logger.warning("%s has been silent for %.0f s", self, now - self.last_heard)

    def __str__(self) -> str:
        return f"process {self.hello.process_id} (pid {self.hello.pid} on {self.hello.host})"


@dataclass(eq=False)
class InFlight:
    """A command that was sent and has not been answered by every process."""

    #: its block in the group's inbox, until every process has answered
    block: Block | None
    unanswered: set[int]
    #: process 0's answer, with its tensors
    outcome: Outcome | None = None
    tensors: list[np.ndarray] = field(default_factory=list)
    outcome_block: Block | None = None
    #: process 0 alone does the part that may fail (it writes files), so the others need not agree with it
    decided_by_first: bool = False
    #: process_id -> whether it failed, to notice that they disagree
    failed: dict[int, bool] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return not self.unanswered

    @property
    def disagreement(self) -> str | None:
        if self.decided_by_first or len(set(self.failed.values())) < 2:
            return None
        answers = ", ".join(
            f"process {id}: {'failed' if failed else 'finished'}" for id, failed in sorted(self.failed.items())
        )
        return f"its processes disagree ({answers})"


@dataclass(eq=False)
class Group:
    """One worker, as the scheduler sees it."""

    name: str
    num_processes: int
    capabilities: frozenset[Capability]
    #: where its processes join, by the launcher of the first one; "" = by `backend_config`
    coordinator_address: str = ""
    #: the highest rank that somebody had asked for when its first process attached
    lora_rank: int = 0
    #: process_id -> attached process; a lost one takes the whole group with it
    members: dict[int, Member] = field(default_factory=dict)
    #: tensors for every member on this host; None until the first of them attaches
    inbox: ArenaWriter | None = None
    #: set once all members are ready, and never taken back: a group that is lost is forgotten
    is_ready: bool = False
    next_number: int = 1
    in_flight: dict[int, InFlight] = field(default_factory=dict)

    @property
    def all_ready(self) -> bool:
        return len(self.members) == self.num_processes and all(member.info for member in self.members.values())

    def take_number(self, command: Command, block: Block | None) -> int:
        number = self.next_number
        self.next_number += 1
        self.in_flight[number] = InFlight(block, set(self.members), decided_by_first=isinstance(command, SaveAdapter))
        return number

    def close(self) -> None:
        """Release the group's shared memory."""
        for member in self.members.values():
            if member.outbox:
                member.outbox.close()
                Path(member.outbox_path).unlink(missing_ok=True)
        if self.inbox:
            self.inbox.close()
            Path(self.inbox.path).unlink(missing_ok=True)

    def silence(self, now: float) -> str:
        """Which of its processes are silent; "" if none is, or if it has not been ready yet."""
        lines = [
            f"worker {self.name}.{id}: silent for {now - member.last_heard:.0f} s"
            for id, member in sorted(self.members.items())
            if member.is_silent and self.is_ready
        ]
        return "; ".join(lines)

    def waiting_for(self, without: Container[tuple[str, int]] = ()) -> list[str]:
        """What this group still lacks, one line for each process."""
        ids = (id for id in range(self.num_processes) if (self.name, id) not in without)
        return [line for id in ids if (line := self._member_waits_for(id))]

    def _member_waits_for(self, process_id: int) -> str | None:
        name = f"{self.name}.{process_id}"
        member = self.members.get(process_id)
        if member is None:
            return f"worker {name}: not attached"
        if member.info:
            return None
        return f"worker {name}: {describe(member.progress)}"


def describe(progress: Progress | None) -> str:
    if progress is None:
        return "starting"
    if progress.total <= 0:
        return progress.stage
    return f"{progress.stage} {100 * progress.done / progress.total:.0f} %"


def differences_of(infos: Sequence[EngineInfo]) -> str:
    """Where processes of one mesh differ, "" if nowhere: they must have loaded one model and form the same batches."""
    fields = {name: [getattr(info, name) for info in infos] for name in EngineInfo.__struct_fields__}
    return "; ".join(
        f"{name} is " + ", ".join(f"{value} in process {id}" for id, value in enumerate(values))
        for name, values in fields.items()
        if any(value != values[0] for value in values)
    )
