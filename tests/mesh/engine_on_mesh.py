"""One process of a mesh that runs a fixed stream of commands, without a server; process 0 writes what came out.

    python engine_on_mesh.py <Welcome as JSON> <out.npz> [<key of a checkpoint to go on from>]

Whoever starts it sets XLA_FLAGS for the number of fake CPU devices.
"""

from __future__ import annotations

import os
import sys

import jax
import msgspec
import numpy as np
from jax.experimental import multihost_utils

from tx_async.engine.engine import create
from tx_async.testing.engine_bench import EngineBench, Segment, rl_segment, segment
from tx_async.wire.worker import (
    AdapterConfig,
    AdmitSequences,
    LoadSampler,
    PromptScores,
    Sampled,
    SampleQuantum,
    SequenceSpec,
    Welcome,
)

PROMPT = np.arange(3, 23, dtype=np.int32)
ADAPTER = AdapterConfig(rank=4, seed=1)
LENGTH = 32
KEY = "run/trained"

Found = dict[str, np.ndarray]


def main(welcome: str, out: str, key: str = "") -> None:
    told = msgspec.json.decode(welcome, type=Welcome)
    bench = EngineBench(create(told, lambda *_: None))
    found = go_on(bench, key) if key else begin(bench)
    if told.process_id == 0:
        np.savez(out, **found)
    bench.engine.close()
    multihost_utils.sync_global_devices("done")  # whoever goes first takes the others with it
    sys.stdout.flush()
    os._exit(0)


def begin(bench: EngineBench) -> Found:
    """Two adapters of two losses side by side, a save of each kind, samples of the base model and of an adapter."""
    bench.create(0, ADAPTER.rank, ADAPTER.seed)
    bench.create(1, 3, seed=2)
    found: Found = {}
    for step in range(3):
        found |= one_step(bench, step)
    bench.save(0, ADAPTER, KEY)
    bench.save(0, ADAPTER, "run/sampler", "sampler")
    return found | state(bench, 0) | sample(bench) | {"share of one device": share_of_one_device(bench)}


def go_on(bench: EngineBench, key: str) -> Found:
    """What was saved on another mesh, and one more step."""
    bench.load(0, ADAPTER, key)
    found = state(bench, 0)
    bench.create(1, 3, seed=2)
    return found | {f"next {name}": values for name, values in one_step(bench, 3).items()}


def one_step(bench: EngineBench, step: int) -> Found:
    rows: list[tuple[int, list[Segment]]] = [
        (0, [segment(20, step), segment(9, step + 50)]),
        (1, [rl_segment(25, step, "ppo")]),
    ]
    logprobs, losses = bench.train(*rows, length=LENGTH)
    norms = [bench.step(slot).metrics["grad_norm"] for slot in (0, 1)]
    return {f"logprobs {step}": logprobs, f"losses {step}": losses, f"grad_norm {step}": np.array(norms)}


def state(bench: EngineBench, slot: int) -> Found:
    whole = bench.engine._programs["read_state"](bench.engine.training, np.int32(slot))
    leaves = jax.tree_util.tree_leaves_with_path(whole)
    return {f"state{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}


def share_of_one_device(bench: EngineBench) -> np.ndarray:
    """What part of the layers' adapters, moments and gradients a device of this process holds."""
    stacks = [stack for tree in bench.engine.training[:4] for name, stack in tree.items() if name != "head"]
    leaves = jax.tree.leaves(stacks)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return np.array(held / sum(leaf.nbytes for leaf in leaves))


def sample(bench: EngineBench) -> Found:
    bench.run(LoadSampler(sampler_slot=1, key="run/sampler"))
    scores = PromptScores(logprobs=True, topk=2)
    common = {"prompt": 0, "max_tokens": 12, "seed": 7}
    drawn = {"sampler_slot": 1, "adapter_version": "run/sampler", "temperature": 1.0, "top_p": 0.9}
    specs = (
        SequenceSpec(
            sequence_id=1, sampler_slot=-1, adapter_version="", prompt_scores=scores, temperature=0.0, **common
        ),
        SequenceSpec(sequence_id=2, **drawn, **common),
    )
    bench.run(AdmitSequences(sequences=specs), [PROMPT])
    found: Found = {}
    while len(found) < 6:
        result, tensors = bench.run(SampleQuantum(decode_steps=4, prefill_tokens=64))
        assert isinstance(result, Sampled)
        for one in result.finished:
            for name in ("tokens", "logprobs", "prompt_logprobs"):
                index = getattr(one, name)
                found[f"sample {one.sequence_id} {name}"] = tensors[index] if index >= 0 else np.zeros(0)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
