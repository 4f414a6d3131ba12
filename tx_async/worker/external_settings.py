"""Settings of the external engine that a worker speaks for, and how they get from the operator to the worker process.

The key travels in the environment: everybody on a host sees the command lines of its processes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct

from tx_async.errors import ConfigError

API_KEY_VARIABLE = "TX_WORKER_VLLM_API_KEY"
ENGINE = "vllm"
CAPABILITIES = "sample"
NAME_CHARACTERS_MAX = 64


class ExternalSettings(Struct, frozen=True, kw_only=True):
    url: str
    """The URL of the engine's HTTP server, for example http://127.0.0.1:8001."""
    lora_dir: str
    """The folder for adapters, which the engine sees under the same path."""
    api_key: str = ""
    allow_unproven: bool = False
    """Whether to sample adapters of mixtures of experts, too."""
    worker_name: str = ""

    @property
    def name(self) -> str:
        """The worker's name. Unless one was given, it is where the engine listens, because each engine has its own
        worker."""
        address = re.sub(r"[^A-Za-z0-9_.-]+", "-", urlsplit(self.url).netloc or self.url)
        return self.worker_name or f"{ENGINE}-{address}"[:NAME_CHARACTERS_MAX]

    def check(self, url_flag: str, lora_dir_flag: str) -> ExternalSettings:
        """Returns the settings. Raises `ConfigError` naming the flag that is wrong or missing."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"{url_flag} is {self.url!r}; it must look like http://127.0.0.1:8001.")
        if not self.lora_dir:
            raise ConfigError(f"{lora_dir_flag} is missing: a folder for adapters that vLLM can read as well.")
        return self

    @property
    def arguments(self) -> list[str]:
        """The settings as flags of `python -m tx_async.worker.main`."""
        flags = ["--vllm-url", self.url, "--vllm-lora-dir", self.lora_dir]
        return [*flags, *["--vllm-allow-unproven"] * self.allow_unproven]

    @property
    def environment(self) -> dict[str, str]:
        return {API_KEY_VARIABLE: self.api_key} if self.api_key else {}


def api_key_from_environment() -> str:
    return os.environ.get(API_KEY_VARIABLE, "")


def read_key_file(path: str, flag: str) -> str:
    """The key in a file. Raises `ConfigError` for a file that cannot be read or is empty."""
    if not path:
        return ""
    try:
        key = Path(path).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} names {path}, which cannot be read: {error}.") from error
    if not key:
        raise ConfigError(f"{flag} names {path}, which is empty.")
    return key
