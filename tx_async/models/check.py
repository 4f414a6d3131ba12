"""The loader's own checks of a folder, without reading a weight: `python -m tx_async.models.check FOLDER`.

`doctor` runs it in a process of its own, because the server never imports JAX.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tx_async.errors import BaseModelError
from tx_async.models import tensor_files
from tx_async.models.load import check, model_of


def check_folder(folder: Path) -> None:
    """Raises the `BaseModelError` that a worker would raise on loading it."""
    check(model_of(folder), tensor_files.open_folder(folder))


def main(folder: str) -> int:
    try:
        check_folder(Path(folder))
    except BaseModelError as error:
        print(error.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
