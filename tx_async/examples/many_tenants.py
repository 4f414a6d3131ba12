"""Several tenants at once: each trains an adapter of its own on the same server, and none changes another's numbers.

    python -m tx_async.examples.many_tenants [STEPS]

Every tenant is a client with an API key of its own (a server without a keys file takes any key). Their micro-batches
share the device; their losses are those that each would have alone.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import tinker

from tx_async.examples.common import base_model, datum_of, mean_loss

TENANTS = {
    "alice": ("The capital of France is", " Paris.\n"),
    "bob": ("Two and two make", " four.\n"),
    "carol": ("The opposite of hot is", " cold.\n"),
}
LEARNING_RATE = 0.005


def train(name: str, steps: int) -> list[float]:
    """One tenant's losses."""
    key = f"tml-{name}"
    service = tinker.ServiceClient(api_key=key)
    trainer = service.create_lora_training_client(base_model=base_model(key), rank=8, seed=1).result()
    data = [datum_of(trainer.get_tokenizer(), *TENANTS[name])]
    losses = []
    for _ in range(steps):
        batch = trainer.forward_backward(data, "cross_entropy")
        update = trainer.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
        losses.append(mean_loss(data, batch.result()))
        update.result()
    service.close("success").result()
    return losses


def main(steps: int = 15) -> None:
    with ThreadPoolExecutor(len(TENANTS)) as pool:
        try:
            together = dict(zip(TENANTS, pool.map(train, TENANTS, [steps] * len(TENANTS)), strict=True))
        except tinker.AuthenticationError:
            sys.exit("This server has a keys file and refuses keys made up here: try one without, as the demo's.")
    for name, losses in together.items():
        print(f"{name:6} loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    alone = train("alice", steps)
    print("alice alone: " + ("the same numbers" if alone == together["alice"] else "other numbers"))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
