"""The work that `peers.py` gives to everybody: NumPy alone, since each peer has an environment of its own."""

from __future__ import annotations

import numpy as np

VOCAB = 32_000
RANK = 8
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {"train": ("uniform", "mixed"), "sample": ("one_prompt", "mixed")}


def sequences(case: str, seed: int) -> list[np.ndarray]:
    """Of one batch: 16 of 256 tokens, or of 32 to 512."""
    random = np.random.default_rng(seed)
    lengths = random.integers(32, 513, 16) if case == "mixed" else [256] * 16
    return [random.integers(0, VOCAB, length + 1) for length in lengths]


def samples(case: str, seed: int) -> list[tuple[np.ndarray, int]]:
    """(prompt, tokens to sample): 16 of 128 tokens of one prompt, or 32 of different ones."""
    random = np.random.default_rng(seed)
    if case == "one_prompt":
        return [(random.integers(0, VOCAB, 32), 128)] * 16
    return [(random.integers(0, VOCAB, 16 + 2 * i), int(n)) for i, n in enumerate(random.integers(16, 257, 32))]
