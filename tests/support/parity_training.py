"""Ten AdamW steps on one adapter, here and in PEFT: the same batches, the same weights at the end.

Used by `tests/models/test_training_parity.py` and by the script that stores the reference values.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tests.support import parity
from tests.support.parity import Case
from tx_async.engine import adapter_slots, train
from tx_async.engine.adapter_slots import TrainingState
from tx_async.engine.batch import RowBatch, row_batch
from tx_async.engine.kernels import Kernels
from tx_async.engine.optimizer import Adam, optim_step
from tx_async.engine.platform import current
from tx_async.layers.residuals import NOTHING
from tx_async.models.decoder import Decoder, Params
from tx_async.models.load import from_config
from tx_async.models.peft import AdapterWeights, from_peft, to_peft
from tx_async.testing.engine_bench import BatchSegment, micro_batch, segment
from tx_async.wire.worker import AdamParams, AdapterConfig

STEPS, ROWS, LENGTH = 10, 2, 16
CONFIG = AdapterConfig(rank=8)
ADAMS = {
    "defaults": AdamParams(learning_rate=0.006),
    "decay_and_clip": AdamParams(
        learning_rate=0.006, beta1=0.8, beta2=0.99, eps=1e-8, weight_decay=0.2, grad_clip_norm=100.0
    ),
}
"""Ten steps at this rate move every matrix by a fifth of its norm or more; the clip is below every norm met."""
STORED_VALUES = 64
"""Of each matrix of all layers, at places drawn from a seed, in the golden file."""


def segments_of(case: Case) -> list[list[BatchSegment]]:
    """[step][row]: other tokens and targets each time, and rows of different lengths."""
    vocab = case.config["vocab_size"]
    return [
        [segment(LENGTH - 3 * row, seed=100 * step + row, vocab=vocab) for row in range(ROWS)] for step in range(STEPS)
    ]


def start_of(case: Case) -> AdapterWeights:
    return parity.random_adapter(from_config(case.config), CONFIG)


def step_program(model: Decoder) -> Any:
    """A jitted (params, state, batch, adam) -> (state, gradient norm): the engine's own two programs, one after the
    other."""

    def step(params: Params, state: TrainingState, batch: RowBatch, adam: Adam) -> tuple[TrainingState, Array]:
        gradients, _, _ = train.forward_backward(
            current(), Kernels(), model, CONFIG.rank, NOTHING, params, state.weights, state.gradients, batch
        )
        state, outcome = optim_step(state._replace(gradients=gradients), jnp.int32(0), adam)
        return state, outcome.grad_norm

    # Half the time to compile, and what is compared is the formulas.
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})


def trained(
    model: Decoder, params: Params, case: Case, program: Any, adam: AdamParams
) -> tuple[AdapterWeights, np.ndarray]:
    """-> (the adapter after STEPS steps here, gradient norm before each). program: of `step_program`."""
    state = started(model, start_of(case))
    ranks, norms = np.array([CONFIG.rank, 0], np.int32), []
    for rows in segments_of(case):
        command, tensors = micro_batch([(0, [row]) for row in rows], LENGTH)
        state, norm = program(params, state, row_batch(command, tensors, ranks, model.vocab_size)[0], Adam.of(adam))
        norms.append(float(norm))
    weights = jax.tree.map(lambda x: np.asarray(x)[:, 0], state.weights)
    return adapter_slots.trim(weights, CONFIG.rank), np.array(norms)


def started(model: Decoder, adapter: AdapterWeights) -> TrainingState:
    """The adapter in slot 0 of two, everything else zero; on the host, so that it costs no programs."""
    shapes = jax.eval_shape(partial(adapter_slots.zeros, model.lora_targets(), 2, CONFIG.rank))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    for slots, values in zip(jax.tree.leaves(state.weights), jax.tree.leaves(adapter), strict=True):
        slots[:, 0] = values
    return state


def leaves_of(adapter: AdapterWeights) -> Iterator[tuple[str, np.ndarray]]:
    for stack, names in adapter.items():
        for name, (a, b) in names.items():
            yield f"{stack}/{name}/A", np.asarray(a)
            yield f"{stack}/{name}/B", np.asarray(b)


def sampled(leaf: np.ndarray) -> np.ndarray:
    """What the golden file holds of a matrix."""
    places = np.random.default_rng(leaf.size).choice(leaf.size, min(leaf.size, STORED_VALUES), replace=False)
    return leaf.ravel()[places]


# ---- the same in PEFT


def reference_trained(folder: Path, case: Case, adam: AdamParams, scratch: Path) -> AdapterWeights:
    """The adapter after STEPS steps of torch's AdamW in PEFT. folder: the base model; scratch: for adapters."""
    torch, model = parity.reference_torch(), from_config(case.config)
    reference = peft_model(folder, *to_peft(model, start_of(case), CONFIG), scratch / "start")
    parameters = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
    )
    for rows in segments_of(case):
        optimizer.zero_grad()
        for row in rows:
            tokens, targets = (torch.tensor(row[name][None]) for name in ("tokens", "target_tokens"))
            logits = reference(tokens).logits
            torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum").backward()
        gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
        keep_own_blocks(gradients, model.interleaved_experts)
        if adam.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, adam.grad_clip_norm)
        optimizer.step()
    return from_peft(model, *saved_by_peft(reference, scratch / "end"))[0]


def peft_model(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], scratch: Path) -> Any:
    """The base model in `folder` with an adapter of ours, in PEFT, trainable."""
    import peft  # pyright: ignore[reportMissingImports]
    from safetensors.numpy import save_file

    scratch.mkdir()
    save_file(tensors, scratch / "adapter_model.safetensors", {"format": "pt"})
    (scratch / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(action="ignore"):  # PEFT has opinions about tied heads
        return peft.PeftModel.from_pretrained(parity.reference_model(folder), scratch, is_trainable=True).eval()


def saved_by_peft(reference: Any, scratch: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """-> (tensors, config) of the files that PEFT itself writes."""
    from safetensors.numpy import load_file

    with warnings.catch_warnings(action="ignore"):
        reference.save_pretrained(scratch)
    config = json.loads((scratch / "adapter_config.json").read_text())
    return load_file(scratch / "adapter_model.safetensors"), config


def keep_own_blocks(tensors: dict[str, Any], interleaved: bool) -> None:
    """In a fused gate_up_proj, B (and its gradient) also has a block between gate's A and up's output: no such weight
    exists here, so it stays zero. tensors: by PEFT's names, changed in place."""
    for name, tensor in tensors.items():
        if name.endswith("experts.base_layer.lora_B.default.weight"):
            parity.keep_own_blocks(tensor, interleaved)
