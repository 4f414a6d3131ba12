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
from tx_async.testing.engine_bench import BatchSegment, EngineBench, rl_segment, segment
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
LOSSES = (("importance_sampling", "ppo"), ("cispo", "dro"), ("gspo", "ppo"), ("ppo", "gspo"))
"""Of the second adapter's two sequences in each step; the first adapter's are cross-entropy."""
OUTPUTS = (
    "tokens", "logprobs", "topk_token_ids", "topk_logprobs", "prompt_logprobs", "prompt_topk_token_ids",
    "prompt_topk_logprobs", "target_logprobs", "alt_token_ids", "alt_logprobs",
)  # fmt: skip

Found = dict[str, np.ndarray]


def main(welcome: str, out: str, key: str = "") -> None:
    told = msgspec.json.decode(welcome, type=Welcome)
    bench = EngineBench(create(told, lambda *_: None))
    found = go_on(bench, key) if key else begin(bench)
    if told.process_id == 0:
        np.savez(out, allow_pickle=False, **found)
    bench.engine.close()
    multihost_utils.sync_global_devices("done")  # whoever goes first takes the others with it
    sys.stdout.flush()
    os._exit(0)


def begin(bench: EngineBench) -> Found:
    """Two adapters side by side and every loss, a save of each kind, samples of the base model and of an adapter."""
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
    rows: list[tuple[int, list[BatchSegment]]] = [
        (0, [segment(20, step), segment(9, step + 50)]),
        (1, [rl_segment(14, step, LOSSES[step][0]), rl_segment(11, step + 50, LOSSES[step][1])]),
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
    """Every feature of sampling, in more sequences than decode at once, two of which share their prompt's pages."""
    bench.run(LoadSampler(sampler_slot=1, key="run/sampler"))
    scores = PromptScores(logprobs=True, topk=2, targets_index=1, alt_tokens_k=2)
    candidates = np.random.default_rng(3).integers(0, 320, (len(PROMPT) - 1, 2)).astype(np.int32)
    base = {"sampler_slot": -1, "adapter_version": "", "prompt_index": 0, "max_tokens": 12, "seed": 7}
    drawn = base | {"sampler_slot": 1, "adapter_version": "run/sampler"}
    specs = (
        SequenceSpec(sequence_id=1, **base, prompt_scores=scores, temperature=0.0),
        SequenceSpec(sequence_id=2, **drawn, top_p=0.9, topk_logprobs=3),
        SequenceSpec(sequence_id=3, **drawn, top_k=5, temperature=1.5, sample_index=1),
        SequenceSpec(sequence_id=4, **drawn, temperature=2.0, stop_token_ids=tuple(range(0, 320, 4))),
        SequenceSpec(sequence_id=5, **base, temperature=2.0, stop_strings=("a", "e", "i", "o", "u")),
    )
    bench.run(AdmitSequences(sequences=specs), [PROMPT, candidates])
    found: Found = {}
    unfinished = {spec.sequence_id for spec in specs}
    while unfinished:
        result, tensors = bench.run(SampleQuantum(decode_steps=4, prefill_tokens=64))
        assert isinstance(result, Sampled)
        for one in result.finished:
            unfinished.remove(one.sequence_id)
            indexes = {name: getattr(one, f"{name}_index") for name in OUTPUTS}
            asked = {name: index for name, index in indexes.items() if index >= 0}
            found |= {f"sample {one.sequence_id} {name}": tensors[index] for name, index in asked.items()}
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
