"""Store where ten AdamW steps in PEFT end, for `tests/models/test_training_parity.py`.

    python tests/golden/make_training.py [CASE ...]

Needs torch and peft. Without names all are made anew, with names those alone, and the others stay.
Weights, adapters and batches come from seeds; of each trained matrix some values are stored.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import peft

from tests.support import parity, parity_training
from tx_async.testing.models import make_model

GOLDEN = Path(__file__).with_name("training.npz")


def main() -> None:
    wanted = sys.argv[1:]
    stored = dict(np.load(GOLDEN)) if wanted else {}
    golden = {name: values for name, values in stored.items() if name.split("/")[0] not in wanted}
    for case in parity.FAMILIES:
        if wanted and case.name not in wanted:
            continue
        for name, adam in parity_training.ADAMS.items():
            with tempfile.TemporaryDirectory() as folder:
                model = make_model(Path(folder) / "model", case.config, tokenizer=False)
                adapter = parity_training.reference_trained(model, case, adam, Path(folder))
            for leaf, values in parity_training.leaves_of(adapter):
                golden[f"{case.name}/{name}/{leaf}"] = parity_training.sampled(values)
    np.savez_compressed(GOLDEN, **golden)
    print(f"{len(golden)} matrices of PEFT {peft.__version__}, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
