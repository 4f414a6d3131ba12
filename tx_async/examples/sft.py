"""Supervised fine-tuning: teach an adapter three phrases of Pig Latin, save it, and ask it.

    python -m tx_async.examples.sft [STEPS]

The two calls of a step are sent together, so the server never waits for this loop between them.
"""

from __future__ import annotations

import sys

import tinker

from tx_async.examples.common import base_model, datum_of, mean_loss

PHRASES = {
    "banana split": "anana-bay plit-say",
    "quantum physics": "uantum-qay ysics-phay",
    "coding wizard": "oding-cay izard-way",
}
LEARNING_RATE = 0.005
"""For the demo's tiny model; 1e-4 to 5e-4 suits real ones."""


def prompt_of(english: str) -> str:
    return f"English: {english}\nPig Latin:"


def main(steps: int = 40) -> None:
    service = tinker.ServiceClient()
    trainer = service.create_lora_training_client(base_model=base_model(), rank=32).result()
    tokenizer = trainer.get_tokenizer()
    data = [datum_of(tokenizer, prompt_of(english), f" {latin}\n") for english, latin in PHRASES.items()]
    for step in range(steps):
        batch = trainer.forward_backward(data, "cross_entropy")
        update = trainer.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
        loss = mean_loss(data, batch.result())
        update.result()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3}  loss {loss:.3f}")

    checkpoint = trainer.save_weights_for_sampler("pig-latin").result().path
    sampler = service.create_sampling_client(model_path=checkpoint).result()
    params = tinker.SamplingParams(max_tokens=32, temperature=0.0, stop=["\n"])
    for english in PHRASES:
        prompt = tinker.ModelInput.from_ints(tokenizer.encode(prompt_of(english), add_special_tokens=True))
        answer = sampler.sample(prompt, num_samples=1, sampling_params=params).result().sequences[0]
        print(f"{english} -> {str(tokenizer.decode(answer.tokens)).strip()}")
    print(f"saved {checkpoint}")
    service.close("success").result()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
