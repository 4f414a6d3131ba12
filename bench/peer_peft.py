"""transformers + PEFT + torch at the work of `peers.py`, in an environment of its own.

    VENV/bin/python bench/peer_peft.py MODEL_FOLDER

Reads a case and a seed a line from its input (`train uniform 0`, `sample mixed 1`) and answers with the number of
tokens when they are done. Written as a user would: padded batches of four, a LoRA on every linear layer, `generate`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import peers_work as work
import torch  # pyright: ignore[reportMissingImports]
from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM

ROWS = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Peft:
    def __init__(self, folder: Path):
        dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE)
        settings = LoraConfig(r=work.RANK, lora_alpha=32, target_modules=work.MODULES)
        self.model = get_peft_model(base, settings)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def train(self, case: str, seed: int) -> int:
        """One batch and a step; -> its tokens."""
        sequences = sorted(work.sequences(case, seed), key=len)
        for start in range(0, len(sequences), ROWS):
            self._backward(sequences[start : start + ROWS])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(map(len, sequences))

    def _backward(self, rows: list[np.ndarray]) -> None:
        width = max(map(len, rows))
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        targets = torch.full((len(rows), width), -100)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.from_numpy(row)
            targets[i, : len(row) - 1] = torch.from_numpy(row[1:])
        tokens, targets = tokens.to(DEVICE), targets.to(DEVICE)
        logits = self.model(input_ids=tokens, attention_mask=(targets != -100).long()).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()

    def sample(self, case: str, seed: int) -> int:
        """All prompts of the case in one padded batch, up to the longest answer; -> tokens that were asked for."""
        asked = work.samples(case, seed)
        width, longest = max(len(prompt) for prompt, _ in asked), max(count for _, count in asked)
        tokens = torch.zeros(len(asked), width, dtype=torch.long)
        mask = torch.zeros(len(asked), width, dtype=torch.long)
        for i, (prompt, _) in enumerate(asked):
            tokens[i, width - len(prompt) :] = torch.from_numpy(prompt)
            mask[i, width - len(prompt) :] = 1
        with torch.no_grad():
            self.model.generate(
                input_ids=tokens.to(DEVICE), attention_mask=mask.to(DEVICE), do_sample=True, top_k=0,
                min_new_tokens=longest, max_new_tokens=longest, pad_token_id=0,
            )  # fmt: skip
        return sum(count for _, count in asked)


def main(folder: str) -> None:
    peft = Peft(Path(folder))
    for line in sys.stdin:
        kind, case, seed = line.split()
        print((peft.train if kind == "train" else peft.sample)(case, int(seed)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
