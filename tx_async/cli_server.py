"""The running server that a command talks to: its URL and an API key, from arguments or the SDK's variables."""

from __future__ import annotations

import argparse
import os

from tx_async.errors import ConfigError


def add(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base-url", default="", metavar="URL", help="the server's URL [TINKER_BASE_URL]")
    command.add_argument("--api-key", default="", metavar="KEY", help="the owner's API key [TINKER_API_KEY, or none]")


def chosen(args: argparse.Namespace) -> tuple[str, str]:
    """(URL, API key). Raises `ConfigError` when nothing names a server."""
    base_url = args.base_url or os.environ.get("TINKER_BASE_URL", "")
    if not base_url:
        raise ConfigError("Which server? Give --base-url URL, or set TINKER_BASE_URL.")
    return base_url, args.api_key or os.environ.get("TINKER_API_KEY", "")
