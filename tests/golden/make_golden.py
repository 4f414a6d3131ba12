"""Store the reference logits of transformers for every case of `tests.support.parity`.

    python tests/golden/make_golden.py [CASE ...]

Needs torch. Without names all are made anew, with names those alone, and the others stay.
Weights and tokens come from seeds, so only logits are stored: the last positions of each sequence, fp32.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import transformers

from tests.support import parity
from tx_async.testing.models import make_model

GOLDEN = Path(__file__).with_name("logits.npz")


def main() -> None:
    wanted = sys.argv[1:]
    golden = dict(np.load(GOLDEN)) if wanted else {}
    for case, seed in parity.cases_with_seeds():
        if wanted and case.name not in wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            make_model(folder, case.config, seed, tokenizer=False)
            logits = parity.reference_logits(Path(folder), parity.tokens_of(case, seed))
        golden[parity.golden_name(case, seed)] = logits[0, -parity.STORED_POSITIONS :]
    np.savez_compressed(GOLDEN, **golden)
    print(f"{len(golden)} sequences of transformers {transformers.__version__}, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
