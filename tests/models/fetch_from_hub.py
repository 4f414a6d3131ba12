"""Run by `test_hub.py` in a process whose hub is a server of the test: fetch and load each name.

Prints one JSON object per name: a digest of all parameters, or the error.
"""

import hashlib
import json
import sys

import jax
import numpy as np
from huggingface_hub import constants

from tx_async.errors import BaseModelError
from tx_async.models.load import load_model


def main(chunk_bytes: str, *names: str) -> None:
    """chunk_bytes: of a download, in place of 10 MiB; what is less is lost with the connection."""
    constants.DOWNLOAD_CHUNK_SIZE = int(chunk_bytes)
    for name in names:
        try:
            _, params = load_model(name)
        except BaseModelError as error:
            print(json.dumps({"error": str(error)}))
        else:
            digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)))
            print(json.dumps({"digest": digest.hexdigest()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
