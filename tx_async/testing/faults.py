"""What the fake engine can be told to do wrong."""

from __future__ import annotations

import os
import signal
import time

from msgspec import Struct

from tx_async.errors import EngineError

FAULTS_VARIABLE = "FAKE_ENGINE"
"""Environment of a worker process: `Faults` as JSON."""


class Faults(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes wrong. `*_at` counts executed commands from 1, 0 = never; `once_file` makes a fault happen in one
    life only."""

    load_ms: float = 0.0
    """Time that building the engine takes."""
    command_ms: float = 0.0
    """Time that every command takes on the "device"."""
    load_error: str = ""
    base_model_error: str = ""
    stall_at: int = 0
    stall_ms: float = 0.0
    """The engine's thread is stuck for so long, as in a long compilation."""
    crash_at: int = 0
    """The process dies on the spot."""
    error_at: int = 0
    """An exception that is fatal."""
    user_error_at: int = 0
    """An error that fails one command."""
    once_file: str = ""
    process_id: int = -1
    """The one process of a mesh to which all this happens; -1 = each."""

    def strike(self, number: int) -> None:
        """What is due at this command."""
        if number not in (self.stall_at, self.crash_at, self.error_at, self.user_error_at) or not self.is_due():
            return
        if number == self.stall_at:
            time.sleep(self.stall_ms / 1000)
        if number == self.crash_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.error_at:
            raise RuntimeError("the fake engine was told to fail")
        if number == self.user_error_at:
            raise EngineError("the fake engine was told to fail this command")

    def is_due(self) -> bool:
        if not self.once_file:
            return True
        try:
            os.close(os.open(self.once_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True
