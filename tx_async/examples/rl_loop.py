"""Reinforcement learning: answers are sampled, scored, and made more or less likely by their advantage.

    python -m tx_async.examples.rl_loop [STEPS]

The task is a toy that any model can begin with: an answer's reward is its share of lowercase letters. Each step samples
a group of answers with the newest weights and centres their rewards within the group (GRPO without a scale).
"""

from __future__ import annotations

import sys
from typing import Any

import tinker

from tx_async.examples.common import base_model

PROMPTS = ("Write a word:", "Say something:")
GROUP_SIZE = 16
MAX_TOKENS = 12
LEARNING_RATE = 0.01


def reward_of(text: str) -> float:
    return sum("a" <= char <= "z" for char in text) / max(len(text), 1)


def datum_of(prompt: list[int], answer: tinker.SampledSequence, advantage: float) -> tinker.Datum:
    """Advantages belong to the sampled tokens alone; `logprobs` are the sampler's, for the importance ratio."""
    assert answer.logprobs is not None
    padding = [0.0] * (len(prompt) - 1)
    tokens = prompt + list(answer.tokens)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64"),
            "logprobs": tinker.TensorData(data=padding + list(answer.logprobs), dtype="float32"),
            "advantages": tinker.TensorData(data=padding + [advantage] * len(answer.tokens), dtype="float32"),
        },
    )


def group(sampler: tinker.SamplingClient, tokenizer: Any, text: str) -> tuple[list[tinker.Datum], list[float]]:
    """The data and rewards of one prompt's answers."""
    prompt = tokenizer.encode(text, add_special_tokens=True)
    params = tinker.SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0)
    answers = sampler.sample(tinker.ModelInput.from_ints(prompt), GROUP_SIZE, params).result().sequences
    rewards = [reward_of(tokenizer.decode(answer.tokens)) for answer in answers]
    mean = sum(rewards) / len(rewards)
    return [datum_of(prompt, a, reward - mean) for a, reward in zip(answers, rewards, strict=True)], rewards


def main(steps: int = 12) -> None:
    service = tinker.ServiceClient()
    trainer = service.create_lora_training_client(base_model=base_model(), rank=16).result()
    tokenizer = trainer.get_tokenizer()
    for step in range(steps):
        sampler = trainer.save_weights_and_get_sampling_client().result()
        groups = [group(sampler, tokenizer, prompt) for prompt in PROMPTS]
        data = [datum for data, _ in groups for datum in data]
        rewards = [reward for _, rewards in groups for reward in rewards]
        trainer.forward_backward(data, "importance_sampling")
        trainer.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE)).result()
        print(f"step {step:3}  reward {sum(rewards) / len(rewards):.3f}")
    service.close("success").result()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
