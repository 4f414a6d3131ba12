"""A loop that survives its own death: it looks for its newest checkpoint first, and goes on from there.

    python -m tx_async.examples.resume [STEPS]        # end it whenever you like, and run it again

A crash of the server needs nothing of this: the SDK waits, and the run goes on. This is for the client's own crash, or
for a run that goes on tomorrow. The checkpoint holds weights and optimizer state, so the continued run is the
uninterrupted one.
"""

from __future__ import annotations

import sys

import tinker

from tx_async.examples.common import base_model, datum_of, mean_loss

NAME = "resume-example"
SAVE_EVERY = 5
LEARNING_RATE = 0.005


def newest_checkpoint() -> tuple[str, int] | None:
    """(path, steps that it has behind it) of this program's newest checkpoint; None when there is none."""
    found = tinker.RestClient().list_user_checkpoints(limit=100).result().checkpoints
    steps = {
        item.tinker_path: int(item.checkpoint_id.rsplit("-", 1)[1])
        for item in found
        if item.checkpoint_id.startswith(f"weights/{NAME}-")
    }
    return max(steps.items(), key=lambda item: item[1], default=None)


def main(steps: int = 20) -> None:
    service = tinker.ServiceClient()
    if found := newest_checkpoint():
        path, done = found
        trainer = service.create_training_client_from_state_with_optimizer(path).result()
        print(f"going on after step {done} from {path}")
    else:
        done = 0
        trainer = service.create_lora_training_client(base_model=base_model(), rank=16, seed=1).result()
    data = [datum_of(trainer.get_tokenizer(), "Once upon a time,", " there was a server that never forgot.\n")]
    for step in range(done + 1, steps + 1):
        batch = trainer.forward_backward(data, "cross_entropy")
        trainer.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE)).result()
        print(f"step {step:3}  loss {mean_loss(data, batch.result()):.4f}")
        if step % SAVE_EVERY == 0:
            trainer.save_state(f"{NAME}-{step}").result()
    service.close("success").result()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
