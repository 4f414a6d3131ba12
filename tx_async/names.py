"""The names of the base model: what clients may call it, and where they find its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def listed(base_model_name: str) -> tuple[str, ...]:
    """The names in a comma-separated list; the first is the one that is reported."""
    return tuple(name for part in base_model_name.split(",") if (name := plain(part)))


def plain(name: str) -> str:
    """A name without the slash that a shell's completion leaves at its end."""
    name = name.strip()
    return name.rstrip("/") or name


def names_of(base_model: str, base_model_name: str, folder: Path) -> tuple[str, ...]:
    """Every name of the base model: the listed names, the setting itself, its folder, and its last part."""
    own = plain(base_model)
    names = (*listed(base_model_name), own, *((str(folder),) if Path(own).expanduser().is_dir() else ()))
    return tuple(dict.fromkeys((*names, own.rpartition("/")[2])))


def is_hub_name(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None


def tokenizer_id(tokenizer: str, base_model: str, base_model_name: str, folder: str) -> str:
    """What clients pass to `AutoTokenizer`: the setting, else a hub name, else the folder's resolved path."""
    if tokenizer:
        return tokenizer
    if hub_name := next(filter(is_hub_name, listed(base_model_name)), ""):
        return hub_name
    return folder if base_model and Path(base_model).expanduser().is_dir() else plain(base_model) or folder
