"""The command `tx-async chat`."""

from __future__ import annotations

import argparse
import os
from typing import Any

USUAL_URL = "http://127.0.0.1:8000"


def add(commands: Any) -> None:
    command = commands.add_parser(
        "chat",
        help="talk to a running server's model in the terminal",
        description="Messages go to the server's OpenAI-compatible route; answers appear as they are sampled. Ctrl-C "
        "ends an answer, or the chat when none is under way; an empty line begins a new conversation.",
    )
    command.add_argument("--model", default="", metavar="NAME", help="base model or tinker:// path [the base model]")
    command.add_argument("--base-url", default="", metavar="URL", help=f"[TINKER_BASE_URL, or {USUAL_URL}]")
    command.add_argument("--api-key", default="", metavar="KEY", help="[TINKER_API_KEY, or none]")
    command.add_argument("--system", default="", metavar="TEXT", help="begin each conversation with this")
    command.add_argument("--temperature", type=float, help="[1]")
    command.add_argument("--max-tokens", type=int, help="of one answer [what the context holds]")
    command.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> int:
    import sys

    from tx_async import chat

    fields = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    talk = chat.Talk(
        args.base_url or os.environ.get("TINKER_BASE_URL", "") or USUAL_URL,
        args.api_key or os.environ.get("TINKER_API_KEY", ""),
        args.model,
        args.system,
        {name: value for name, value in fields.items() if value is not None},
    )
    return chat.run(talk, sys.stdin, sys.stdout)
