"""How long a start takes: import, first answer, readiness, first result; with a cold and a warm compilation cache.

    python bench/startup.py [--repeat 3] [--json]

- import: `import tx_async.app` in a fresh interpreter, less the bare interpreter's own start
- accepting: from launch of `tx-async serve` until it answers HTTP at all
- ready: until healthz answers 200
- first result: until the first forward_backward of a new LoRA returned; the client's SDK is imported before the launch

The model has two layers and is 64 wide. Medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tx_async.testing.models import make_qwen3
from tx_async.testing.server import running_server

os.environ |= {"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)


def measure_import() -> float:
    return _run("import tx_async.app") - _run("pass")


def _run(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def measure_start(model: Path, data_dir: Path, cache: Path) -> dict[str, float]:
    import tinker

    from tx_async.demo import EXAMPLES, datum_of

    times: dict[str, float] = {}
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_server(model, data_dir=data_dir, compilation_cache_dir=cache, ready=False))
        server.wait_accepting()
        times["accepting_s"] = time.perf_counter() - began
        server.wait_ready()
        times["ready_s"] = time.perf_counter() - began
        service = stack.enter_context(tinker.ServiceClient(base_url=server.base_url, api_key="tml-bench"))
        trainer = service.create_lora_training_client(base_model=str(model), rank=8).result()
        data = [datum_of(trainer.get_tokenizer(), *example) for example in EXAMPLES]
        trainer.forward_backward(data, "cross_entropy").result()
        times["first_result_s"] = time.perf_counter() - began
    return times


def measure(repeat: int) -> dict[str, float]:
    import tinker  # noqa: F401
    import transformers  # noqa: F401

    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_qwen3(Path(folder) / "model" / "tiny")
        for i in range(repeat):
            sample = {"import_s": measure_import()}
            cache = Path(folder) / f"cache{i}"
            for state in ("cold", "warm"):
                times = measure_start(model, Path(folder) / f"{state}{i}", cache)
                sample |= {f"{state}_{name}": value for name, value in times.items()}
            samples.append(sample)
    return {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}


def report(results: dict[str, float]) -> str:
    cold, warm = ({k[5:]: v for k, v in results.items() if k.startswith(state)} for state in ("cold", "warm"))
    return (
        f"startup: import {results['import_s']:.2f} s; accepting after {cold['accepting_s']:.2f} s; "
        f"ready after {cold['ready_s']:.1f} s cold, {warm['ready_s']:.1f} s warm; "
        f"first result after {cold['first_result_s']:.1f} s cold, {warm['first_result_s']:.1f} s warm "
        f"({os.cpu_count()} cores, {platform.machine()})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print every number, too")
    options = parser.parse_args()
    results = measure(options.repeat)
    if options.json:
        json.dump(results, sys.stdout, indent=1)
        print()
    print(report(results))


if __name__ == "__main__":
    main()
