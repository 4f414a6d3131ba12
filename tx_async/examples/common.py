"""What the examples share: the server's base model, and a datum made of a prompt and its completion."""

from __future__ import annotations

from typing import Any

import tinker


def base_model(api_key: str | None = None) -> str:
    """The name of the model that this server trains."""
    name = tinker.RestClient(api_key=api_key).get_server_capabilities().result().supported_models[0].model_name
    assert name is not None
    return name


def datum_of(tokenizer: Any, prompt: str, completion: str) -> tinker.Datum:
    """Train on the completion only: the prompt's tokens have weight 0.

    At position t the model reads token t and is asked for token t + 1, so inputs lack the last token and targets the
    first one.
    """
    before = tokenizer.encode(prompt, add_special_tokens=True)
    after = tokenizer.encode(completion, add_special_tokens=False)
    tokens = before + after
    weights = [0.0] * len(before) + [1.0] * len(after)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64"),
            "weights": tinker.TensorData(data=weights[1:], dtype="float32"),
        },
    )


def mean_loss(data: list[tinker.Datum], output: tinker.ForwardBackwardOutput) -> float:
    """-Σ weight · logprob / Σ weight. The server's own `loss:sum` is the numerator."""
    return output.metrics["loss:sum"] / sum(sum(datum.loss_fn_inputs["weights"].data) for datum in data)
