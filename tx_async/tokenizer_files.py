"""Checks, at start and in `doctor`, that a folder has a tokenizer with which stop strings can be found.

The server itself never needs it: workers load it at the first stop string (`engine/stops.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

FAST = "tokenizer.json"
OTHERS = (
    ("tokenizer.model",),
    ("sentencepiece.bpe.model",),
    ("spiece.model",),
    ("tiktoken.model",),
    ("tekken.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)
"""Files from which transformers makes a tokenizer when there is no tokenizer.json."""


def problem_of(folder: Path) -> str:
    """What is wrong with the folder's tokenizer, naming the file; "" when nothing is."""
    settings = folder / "tokenizer_config.json"
    if settings.exists() and not _is_object(settings):
        return f"{settings} is not valid JSON"
    path = folder / FAST
    if path.exists():
        return _problem_of_fast(path)
    if any(all(_has_content(folder / name) for name in names) for names in OTHERS) or "snapshots" in folder.parts:
        return ""  # for a hub name, the worker fetches the rest
    return f"{folder} has no {FAST}, nor any other tokenizer file"


def _is_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except ValueError:
        return False


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _problem_of_fast(path: Path) -> str:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        return f"{path} is not a tokenizer: {error}"
    return "" if tokenizer.get_vocab_size() > 0 else f"{path} has no tokens"
