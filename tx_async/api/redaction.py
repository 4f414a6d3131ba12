"""Removes paths, buckets and endpoints of the server from failures that tenants see; the log and the journal keep them.

Reasons come from libraries and other processes, so names in them are recognised by their form, and names from the
settings by their text. Names of models that were served stay, even where they are paths: clients know them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from tx_async.config import ServerConfig

HIDDEN = "…"
_URL = r"(?<![\w+.-])(?!tinker://)[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>)\]},;]*[^\s'\"<>)\]},;:.]"
_PATH = r"(?<![\w/.~…-])~?/[\w.@+~=-]+(?:/[\w.@+~=-]*)*"
_ADDRESS = r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b|\[[0-9A-Fa-f:]{2,}\](?::\d+)?"
_BY_FORM = re.compile(f"{_URL}|{_PATH}|{_ADDRESS}")
_ENDPOINT_VARIABLES = (
    "AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL",
)  # fmt: skip
_NAME_CHARACTERS_MIN = 3


class Redaction:
    def __init__(self, config: ServerConfig, model_name: str, former_names: Callable[[], Iterable[str]] = tuple):
        """former_names: names of other base models that tenants' runs were made with."""
        self._model_name = model_name
        self._former_names = former_names
        named = sorted(_named(config) - {"", model_name}, key=len, reverse=True)
        #: names from the settings, as whole words only
        self._by_text = re.compile("|".join(rf"(?<![\w-]){re.escape(text)}(?![\w-])" for text in named) or r"(?!)")

    def __call__(self, text: str) -> str:
        known = sorted({self._model_name, *self._former_names()} - {""}, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, known))})", text) if known else [text]
        # Every second piece is a name at which the text was split.
        return "".join(piece if number % 2 else self._hide(piece) for number, piece in enumerate(pieces))

    def _hide(self, text: str) -> str:
        return self._by_text.sub(HIDDEN, _BY_FORM.sub(HIDDEN, text))


def _named(config: ServerConfig) -> set[str]:
    """The folders, buckets and hosts that the settings name."""
    found = {
        config.base_model,
        str(config.data_path),
        config.resolved_checkpoints_base,
        config.resolved_compilation_cache_dir,
        config.api_keys_file,
    }
    for url in (config.resolved_checkpoints_base, config.database_url, *map(os.environ.get, _ENDPOINT_VARIABLES)):
        if url and "://" in url:
            found |= {url, urlsplit(url).hostname or "", urlsplit(url).netloc.rpartition("@")[2]}
    return {text for text in found if len(text) >= _NAME_CHARACTERS_MIN}
