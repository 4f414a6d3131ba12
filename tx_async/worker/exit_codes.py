"""How a worker process ends, and what its supervisor makes of it."""

from enum import IntEnum


class ExitCode(IntEnum):
    STOPPED = 0
    """The server, or a signal, told it to stop."""
    CRASHED = 1
    """An error in the engine: start again."""
    REFUSED = 3
    """The server would not have it: start again, later."""
    DETACHED = 4
    """The server is gone, or the rest of its mesh is: start again."""
    ENGINE_GONE = 5
    """The external engine is gone: start again, and wait for it."""
    CONFIGURATION = 78
    """Base model or configuration cannot work, whatever is tried (the sysexits name: EX_CONFIG)."""
