"""Preferences: Direct Preference Optimization (arXiv:2305.18290), as a loss of your own in torch.

    python -m tx_async.examples.dpo [STEPS]

`forward_backward_custom` fetches log-probabilities, differentiates your function of them here, and sends the gradients
back: the server never sees the loss. Needs torch on the client.
"""

from __future__ import annotations

import sys
from typing import Any

import tinker

try:
    import torch  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:
    sys.exit("This example needs torch beside the tinker SDK: pip install torch")

from tx_async.examples.common import base_model, datum_of

PAIRS = (
    ("How are you?", " Fine, thank you.\n", " What do you want?\n"),
    ("Can you help me?", " Gladly.\n", " No.\n"),
)
"""(prompt, the preferred answer, the other one)"""
BETA = 0.1
LEARNING_RATE = 0.002


def log_likelihoods(data: list[tinker.Datum], logprobs: list[Any]) -> Any:
    """Σ of each answer's log-probabilities. [2 * pairs]"""
    weights = [torch.tensor(datum.loss_fn_inputs["weights"].data) for datum in data]
    return torch.stack([(w * lp).sum() for w, lp in zip(weights, logprobs, strict=True)])


def main(steps: int = 20) -> None:
    service = tinker.ServiceClient()
    trainer = service.create_lora_training_client(base_model=base_model(), rank=16).result()
    tokenizer = trainer.get_tokenizer()
    data = [datum_of(tokenizer, prompt, answer) for prompt, *answers in PAIRS for answer in answers]
    before = trainer.forward(data, "cross_entropy").result()
    reference = log_likelihoods(data, [torch.tensor(out["logprobs"].data) for out in before.loss_fn_outputs])

    def dpo(data: list[tinker.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        """-log σ(β · (log-ratio of the preferred answer - that of the other))"""
        ratios = log_likelihoods(data, logprobs) - reference
        margins = BETA * (ratios[0::2] - ratios[1::2])
        return -torch.nn.functional.logsigmoid(margins).mean(), {"margin": float(margins.mean())}

    for step in range(steps):
        output = trainer.forward_backward_custom(data, dpo).result()
        trainer.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE)).result()
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step:3}  margin {output.metrics['margin']:.3f}")
    service.close("success").result()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
