"""Downloads a model's files by its hub name, through `huggingface_hub` and its cache: files that are there are kept,
missing ones are resumed. `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean there."""

from __future__ import annotations

from pathlib import Path

from tx_async.errors import BaseModelError


def snapshot(name: str, patterns: list[str], without: list[str] | None = None) -> Path:
    """The folder with the files of `patterns`, except those of `without`. Raises `BaseModelError`, which says in one
    line what is missing."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=without))
    except Exception as error:  # the library's errors share no base class
        raise BaseModelError(_message(name, error)) from error


def _message(name: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    match error:
        case errors.GatedRepoError():
            return f"{name} is gated: accept its terms on {hub}, then set HF_TOKEN."
        case errors.RepositoryNotFoundError():
            return f"{name} is neither a folder here nor a model on {hub}; if it is private, set HF_TOKEN."
        case errors.HFValidationError():
            return f"{name} is neither a folder here nor a model's name on a hub (owner/name)."
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return f"{name} is not a folder here, nor complete in the cache, and HF_HUB_OFFLINE is set."
        case errors.LocalEntryNotFoundError():
            return f"{name} is not a folder here, nor complete in the cache, and {hub} cannot be reached."
    why = " ".join(str(error).split()) or type(error).__name__
    return f"Downloading {name} from {hub} failed: {why.rstrip('.')}. Complete files are kept: start again to resume."
