"""The base model's tokenizer and its chat templates, read once, when the first request needs them, without importing
JAX or transformers."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from tx_async.api.compatible.json_values import is_list, is_object
from tx_async.errors import InvalidRequest

if TYPE_CHECKING:
    from tx_async.api.compatible.templates import Template

log = logging.getLogger(__name__)

FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SPACE = "\u2581"
"""What SentencePiece writes for a space."""
TOKEN_BYTES_MIN, TOKEN_BYTES_MAX = 16, 64
"""Bounds of `Tokenizer.token_bytes_max`. The lower one leaves room for normalizers, which shorten texts, and for
unknown words, which are one token however long; the upper one is for vocabularies with tokens of many spaces: no prompt
consists of those."""


class Tokenizer:
    """Text to tokens, and each token's bytes."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer as Fast

        self._fast = Fast.from_file(str(folder / FILE))
        self._fast.no_truncation()
        self._fast.no_padding()
        settings = _read_json(folder / SETTINGS)
        added = self._fast.get_added_tokens_decoder()
        self.special = {token: entry.content for token, entry in added.items() if entry.special}
        """Tokens that are not shown, and their names."""
        self.special_tokens = _named_tokens(folder, settings)
        """The values that templates know as `bos_token` and so on."""
        self.template_sources = _template_sources(folder, settings)
        self._templates: dict[str, Template] = {}
        self._frame = _frame(settings)
        self._added = {token: entry.content for token, entry in added.items()}
        decoder = json.dumps(json.loads(self._fast.to_str()).get("decoder"))
        self._byte_of = _byte_of_character() if "ByteLevel" in decoder else None
        self._has_byte_tokens = "ByteFallback" in decoder
        self._bytes: dict[int, bytes] = {}
        self.token_bytes_max = min(max(self._longest(), TOKEN_BYTES_MIN), TOKEN_BYTES_MAX)
        """A text with more bytes than this for each token of a context does not fit it."""

    def _longest(self) -> int:
        """The bytes of the longest token."""
        names = self._fast.get_vocab(with_added_tokens=False)
        if self._byte_of is not None:
            longest = max(map(len, names), default=0)  # each character stands for a byte
        else:
            longest = max((len(name.replace(SPACE, " ").encode()) for name in names), default=0)
        return max([longest, *(len(name.encode()) for name in self._added.values())])

    def encode(self, text: str, framed: bool) -> list[int]:
        """framed: with what the tokenizer puts around a text, such as a token for its beginning."""
        if self._frame is None or not framed:
            return self._encode(text, framed)
        before, after = (self._tokens_named(name) for name in self._frame)
        return [*before, *self._encode(text, False), *after]

    def _encode(self, text: str, framed: bool) -> list[int]:
        # The library's `encode` holds the GIL, also in a thread, and so would stop the event loop. This one does not.
        return self._fast.encode_batch([text], add_special_tokens=framed)[0].ids

    def _tokens_named(self, name: str) -> list[int]:
        token = self._fast.token_to_id(self.special_tokens.get(name, ""))
        return [] if token is None else [token]

    def bytes_of(self, token: int) -> bytes:
        """A token's bytes; empty for a number that is no token, because a model's vocabulary may be padded."""
        if (found := self._bytes.get(token)) is None:
            found = self._bytes[token] = self._make_bytes(token)
        return found

    def _make_bytes(self, token: int) -> bytes:
        name = self._fast.id_to_token(token)
        if name is None:
            return b""
        if self._byte_of is not None:
            if all(character in self._byte_of for character in name):
                return bytes(self._byte_of[character] for character in name)
            return name.encode()
        if token in self._added:
            return name.encode()
        if self._has_byte_tokens and len(name) == 6 and name.startswith("<0x"):
            return bytes([int(name[3:5], 16)])
        return name.replace(SPACE, " ").encode()

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.bytes_of, tokens)).decode("utf-8", "replace")

    def has(self, text: str) -> bool:
        """Whether this is one of its added tokens."""
        return text in self._added.values()

    def template(self, has_tools: bool) -> Template:
        """Raises `InvalidRequest` where there is none."""
        from tx_async.api.compatible.templates import Template

        sources = self.template_sources
        name = "tool_use" if has_tools and "tool_use" in sources else "default"
        if name not in sources:
            raise InvalidRequest(
                "This base model has no chat template, so it cannot be spoken to in messages: use completions."
            )
        if name not in self._templates:
            self._templates[name] = Template(sources[name])
        return self._templates[name]


class TokenizerLoader:
    """Reads the tokenizer of one folder at its first use, in a thread."""

    def __init__(self, folder: str):
        self._folder = folder
        self._tokenizer: Tokenizer | None = None
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<TokenizerLoader {'loaded' if self._tokenizer else 'not loaded yet'}>"

    async def get(self) -> Tokenizer:
        """Raises `InvalidRequest` where there is none."""
        if self._tokenizer is None:
            async with self._lock:
                if self._tokenizer is None:
                    self._tokenizer = await anyio.to_thread.run_sync(load, self._folder)
        return self._tokenizer


def load(folder: str) -> Tokenizer:
    try:
        if not folder or not (Path(folder) / FILE).is_file():
            raise ValueError(f"there is no {FILE}")
        return Tokenizer(Path(folder))
    except Exception as error:  # the library raises bare exceptions
        log.warning("The tokenizer of %s cannot be read: %s", folder, error)
        raise InvalidRequest(
            f"This server cannot turn text into tokens: its base model has no {FILE} that can be read (its log says "
            "why). Send token ids to completions, or use the Tinker API."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _named_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    given = _read_json(folder / "special_tokens_map.json") | settings
    found: dict[str, str] = {}
    for name in NAMED_TOKENS:
        entry = given.get(name)
        text = entry.get("content") if is_object(entry) else entry
        if isinstance(text, str):
            found[name] = text
    return found


def _template_sources(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """A template file takes precedence over the settings."""
    more = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    files = {path.stem: path for path in more} | (
        {"default": folder / TEMPLATE} if (folder / TEMPLATE).is_file() else {}
    )
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    given = settings.get("chat_template")
    if is_list(given):
        return {entry["name"]: entry["template"] for entry in given}
    return {"default": given} if isinstance(given, str) else {}


def _frame(settings: dict[str, Any]) -> tuple[str, str] | None:
    """(the named token before a text, the one after it), "" for none; None where the tokenizer's file says it."""
    if "add_bos_token" not in settings and "add_eos_token" not in settings:
        return None
    return (
        "bos_token" if settings.get("add_bos_token") and settings.get("bos_token") else "",
        "eos_token" if settings.get("add_eos_token") and settings.get("eos_token") else "",
    )


def _byte_of_character() -> dict[str, int]:
    """How byte-level tokenizers write bytes: the printable ones as they are, the others as characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
