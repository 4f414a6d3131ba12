"""How a worker process ends, and what its supervisor makes of it."""

from enum import IntEnum


class ExitCode(IntEnum):
    STOPPED = 0
    """The server, or a signal, told it to stop."""
    CRASHED = 1
    """An error in the engine: start again."""
    REFUSED = 3
    """The server refused it: start again, later."""
    DETACHED = 4
    """The server, or the rest of its mesh, is gone: start again."""
    ENGINE_GONE = 5
    """The external engine is gone: start again, and wait for it."""
    SENT_AWAY = 6
    """The server wants it with other settings: start again."""
    CONFIGURATION = 78
    """The base model or the configuration can never work (EX_CONFIG in sysexits)."""
