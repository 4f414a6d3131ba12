"""`tx-async chat`: a conversation in the terminal, over the route that every client uses."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TextIO

import httpx

from tx_async.errors import ConfigError

ROUTES = "/oai/api/v1"
CONNECT_S = 10.0
PROMPT = "\n> "
STEERING = {"Cc", "Cf", "Cs"}
"""Unicode's categories of characters that steer a terminal or the direction of text, and of halves of characters."""
KEPT = "\n\t\u200c\u200d"
"""The last two join letters in some scripts, and emoji."""
DIM, PLAIN = "\033[2m", "\033[0m"


@dataclass
class Talk:
    """One conversation with one model, and its sampling settings."""

    base_url: str
    api_key: str
    model: str = ""
    system: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)

    def begin(self) -> None:
        """Forget the conversation so far."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def connect(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = httpx.Timeout(None, connect=CONNECT_S)
        return httpx.Client(base_url=self.base_url.rstrip("/") + ROUTES, headers=headers, timeout=timeout)

    def choose_model(self, client: httpx.Client) -> None:
        """Take the base model if none was named."""
        response = client.get("/models")
        _check(response)
        self.model = self.model or response.json()["data"][0]["id"]

    def say(self, client: httpx.Client, text: str) -> Iterator[tuple[str, str]]:
        """Yield ("reasoning" or "text", a piece of the answer). The text is kept, even that of an interrupted
        answer."""
        self.messages.append({"role": "user", "content": text})
        body = {"model": self.model, "messages": self.messages, "stream": True, **self.fields}
        answer = ""
        try:
            with client.stream("POST", "/chat/completions", json=body) as response:
                _check(response)
                for kind, piece in pieces(response.iter_lines()):
                    answer += piece if kind == "text" else ""
                    yield kind, piece
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()


def pieces(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """The pieces in a stream of events. Raises `ConfigError` when an event reports a failure."""
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise ConfigError(event["error"]["message"])
        for choice in event["choices"]:
            for name, kind in (("reasoning_content", "reasoning"), ("content", "text")):
                if piece := choice["delta"].get(name):
                    yield kind, piece


def run(talk: Talk, source: TextIO, sink: TextIO) -> int:
    """Chat until the input ends; 1 when the input was no person's and a message got no whole answer. Raises
    `ConfigError` when there is no server to talk to."""
    is_terminal, num_failed = sink.isatty(), 0
    with talk.connect() as client:
        try:
            talk.choose_model(client)
        except httpx.HTTPError as error:
            raise ConfigError(f"{talk.base_url} cannot be reached: {error}.") from error
        talk.begin()
        print(f"{_plain(talk.model)} (an empty line begins anew, Ctrl-D ends)", file=sink)
        while (text := _read(source, sink)) is not None:
            if text.strip():
                num_failed += not _answer(talk, client, text, sink, is_terminal)
            else:
                talk.begin()
                print("A new conversation.", file=sink)
    return 1 if num_failed and not source.isatty() else 0


def _read(source: TextIO, sink: TextIO) -> str | None:
    sink.write(PROMPT)
    sink.flush()
    line = source.readline()
    return line.rstrip("\n") if line else None


def _answer(talk: Talk, client: httpx.Client, text: str, sink: TextIO, is_terminal: bool) -> bool:
    """Print an answer. A failure is printed as one line, and the conversation goes on; returns whether it was none."""
    try:
        with suppress(KeyboardInterrupt):
            for kind, piece in talk.say(client, text):
                shown = _plain(piece)
                sink.write(f"{DIM}{shown}{PLAIN}" if is_terminal and kind == "reasoning" else shown)
                sink.flush()
        print(file=sink)
        return True
    except ConfigError as error:
        print(f"! {_plain(error.message)}", file=sink)
    except httpx.HTTPError as error:
        print(f"! The server went away: {error}", file=sink)
    return False


def _plain(text: str) -> str:
    """Text without characters that steer: a model may say anything, and what is piped is often shown in the end."""
    return "".join(c for c in text if c in KEPT or unicodedata.category(c) not in STEERING)


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        message = json.loads(response.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"The server answered {response.status_code}."
    raise ConfigError(message)
