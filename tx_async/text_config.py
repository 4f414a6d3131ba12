"""Finds the text model in a `config.json`: all of it, or the `text_config` beside a vision tower."""

from __future__ import annotations

from typing import Any

from tx_async.errors import BaseModelError

SHARED = ("architectures", "quantization_config", "torch_dtype", "dtype")
"""Keys that stand beside the `text_config`, at the top level."""


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Raises `BaseModelError` where a folder has only a vision part."""
    if "text_config" not in config:
        if "vision_config" in config:
            raise BaseModelError("config.json has a vision_config and no text_config: there is no text model to serve.")
        return config
    shared = {key: config[key] for key in SHARED if key in config}
    text = config["text_config"]
    if text.get("eos_token_id") is None:
        shared["eos_token_id"] = config.get("eos_token_id")
    # The top level decides for the whole folder whether the head is the embedding; families differ in their default.
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return {**text, **shared, **({} if tied is None else {"tie_word_embeddings": tied})}
