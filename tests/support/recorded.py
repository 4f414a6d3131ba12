"""Datums of sampled sequences, as tinker-cookbook makes them: their spans say where every token comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tinker
from tinker.types import PromptProvenanceSpan, SampledProvenanceSpan


def datum_of(
    prompt: Sequence[int], sampled: Any, advantage: float = 1.0, on_prompt: float = 0.0, sequence_id: str = ""
) -> tinker.Datum:
    """sampled: of the SDK's answer. Advantages of the prompt's tokens are `on_prompt`. The targets are the tokens from
    the second one on."""
    tokens, before, length = [*prompt, *sampled.tokens], len(prompt) - 1, len(sampled.tokens)
    inputs = {
        "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64"),
        "logprobs": tinker.TensorData(data=[0.0] * before + list(sampled.logprobs), dtype="float32"),
        "advantages": tinker.TensorData(data=[on_prompt] * before + [advantage] * length, dtype="float32"),
    }
    name = sequence_id or sampled.sequence_id
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs).with_provenance(
        model_input=[
            PromptProvenanceSpan(sequence_id=name, length=len(prompt)),
            SampledProvenanceSpan(sequence_id=name, length=length - 1),
        ],
        loss_fn_inputs=[
            PromptProvenanceSpan(sequence_id=name, offset=1, length=before),
            SampledProvenanceSpan(sequence_id=name, length=length),
        ],
    )
