"""Store what transformers' `generate` answers greedily, for `tests/engine/test_decode_architectures.py`.

    python tests/golden/make_greedy.py [CASE ...]

Needs torch. Without names all are made anew, with names those alone, and the others stay.
Weights and prompts come from seeds, so only the answers are stored.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import transformers

from tests.support import parity
from tx_async.testing.models import make_model

GOLDEN = Path(__file__).with_name("greedy.npz")


def main() -> None:
    wanted = sys.argv[1:]
    golden = dict(np.load(GOLDEN)) if wanted else {}
    for case in parity.FAMILIES:
        if wanted and case.name not in wanted:
            continue
        for seed in parity.GREEDY_SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                make_model(folder, case.config, seed, tokenizer=False)
                golden[parity.golden_name(case, seed)] = parity.reference_greedy(Path(folder), case, seed)
    np.savez_compressed(GOLDEN, **golden)
    print(f"{len(golden)} answers of transformers {transformers.__version__}, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
