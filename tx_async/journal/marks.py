"""Memory that outlives the process: a small mapped file, which the kernel keeps whatever ends the process."""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path

from tx_async.private import FILE_MODE, make_folder

_log = logging.getLogger(__name__)


def map_marks(folder: Path, journal_id: str, num_bytes: int) -> mmap.mmap | None:
    """Map the journal's own file in the folder, made when it is missing; None, with a warning, when that fails."""
    path = folder / f"replay-{journal_id[:16]}"
    try:
        make_folder(folder)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, FILE_MODE)
        try:
            # Allocate the file's blocks: writing into a hole of it when the disk is full would end the process.
            os.posix_fallocate(descriptor, 0, num_bytes)
            return mmap.mmap(descriptor, num_bytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        _log.warning("Requests that end the server will not be found out: %s: %s", path, error.strerror)
        return None
