"""Whether a grammar compiles, found out in a process of its own that its grammars may bring down."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
import weakref
from collections import OrderedDict

import anyio.to_thread
import msgspec

from tx_async.api.compatible.answer_grammars import AskedAnswer
from tx_async.api.compatible.grammar_process import Verdict
from tx_async.grammar import GrammarError

KNOWN_MAX = 64
"""How many answers are remembered: programs ask with the same schema again and again."""
ANSWER_S = 60.0
"""A process that has said nothing for so long is ended: its own limits should come much earlier."""
_TOO_MUCH = "it takes too much time or memory to compile. Make it simpler."


class GrammarCheck:
    """Owner of the process, which begins with the first grammar and ends with the server. Keys take turns."""

    def __init__(self, folder: str):
        self._folder = folder
        #: [the process], or []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = asyncio.Lock()
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        #: question -> grammar, the least recently asked first
        self._known: OrderedDict[bytes, str] = OrderedDict()
        weakref.finalize(self, _end, self._processes)

    def __repr__(self) -> str:
        return f"<GrammarCheck [{len(self._known)} known | {len(self._processes)} processes]>"

    async def grammar(self, owner: str, asked: AskedAnswer) -> str:
        """The grammar of such answers. Raises `GrammarError`."""
        question = await anyio.to_thread.run_sync(msgspec.json.encode, asked)  # it may be as large as a body
        if (known := self._known.get(question)) is None:
            turn = self._turns.setdefault(owner, asyncio.Lock())
            async with turn, self._lock:
                known = await anyio.to_thread.run_sync(self._ask, question)
            self._known[question] = known
            if len(self._known) > KNOWN_MAX:
                self._known.popitem(last=False)
        self._known.move_to_end(question)
        return known

    def _ask(self, question: bytes) -> str:
        process = self._processes[0] if self._processes else self._start()
        try:
            assert process.stdin
            process.stdin.write(question + b"\n")
            process.stdin.flush()
            line = _line(process)
        except BrokenPipeError:
            line = b""
        if not line:
            _end(self._processes)
            raise GrammarError(_TOO_MUCH)
        verdict = msgspec.json.decode(line, type=Verdict)
        if verdict.error:
            raise GrammarError(verdict.error)
        return verdict.grammar

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tx_async.api.compatible.grammar_process", self._folder]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a grammar that brings it down is its sender's affair, and not for the log
            bufsize=0,
            start_new_session=True,
        )
        self._processes.append(process)
        return process


def _line(process: subprocess.Popen[bytes]) -> bytes:
    """What it answers; empty where it has ended or hangs."""
    assert process.stdout
    poll, line = select.poll(), b""
    poll.register(process.stdout, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(1000 * ANSWER_S):
            return b""
        if not (more := os.read(process.stdout.fileno(), 65536)):
            return b""
        line += more
    return line


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    while processes:
        process = processes.pop()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
