"""One line per event, on stderr: time, level, where, what."""

from __future__ import annotations

import logging
import sys

from tx_async.errors import ConfigError

FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"
LEVELS = ("debug", "info", "warning", "error")


def configure(level: str = "info") -> None:
    """Set up logging of this process. Raises `ConfigError` for an unknown level."""
    if level.lower() not in LEVELS:
        raise ConfigError(f"log_level {level!r} is unknown; known: {', '.join(LEVELS)}.")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, "%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "jax", "urllib3", "filelock", "hypercorn.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
