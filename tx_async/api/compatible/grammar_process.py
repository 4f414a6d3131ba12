"""The process in which grammars of strangers are compiled for the first time: `python -m … FOLDER`, a question and an
answer to each line. A grammar that takes too much time or memory ends this process, and nothing else.
"""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager

import msgspec

from tx_async.api.compatible.answer_grammars import AskedAnswer, answer_grammar
from tx_async.api.compatible.grammar_ends import check_ends
from tx_async.grammar import Grammar, GrammarError, Vocabulary, vocabulary

COMPILE_CPU_S = 1.0
"""The engine compiles a grammar while everybody's samples wait: it must not take longer than this there either."""
COMPILE_BYTES = 512 * 2**20
"""Address space beyond what the process has when it is ready."""


class Verdict(msgspec.Struct, frozen=True):
    grammar: str = ""
    error: str = ""


def main(folder: str) -> None:
    try:
        words, problem = vocabulary(folder), ""
    except GrammarError as error:
        words, problem = None, error.message
    _limit_memory()
    decoder, encoder = msgspec.json.Decoder(AskedAnswer), msgspec.json.Encoder()
    for line in sys.stdin.buffer:
        verdict = Verdict(error=problem) if words is None else judge(decoder.decode(line), words)
        sys.stdout.buffer.write(encoder.encode(verdict) + b"\n")
        sys.stdout.buffer.flush()


def judge(asked: AskedAnswer, words: Vocabulary) -> Verdict:
    """Compile it, begin an answer, and see whether it can end. What must come after reasoning begins by itself, too:
    there it would be found out only when the reasoning is over."""
    try:
        text = answer_grammar(asked, words.special)
        with _limited_time():
            Grammar(words, text).begin([words.end - 1], words.end)
        if asked.has_body:
            body = answer_grammar(AskedAnswer(schema=asked.schema, grammar=asked.grammar), words.special)
            with _limited_time():
                Grammar(words, body).begin([words.end - 1], words.end)
        with _limited_time():
            check_ends(words, text)
    except GrammarError as error:
        return Verdict(error=error.message)
    return Verdict(grammar=text)


@contextmanager
def _limited_time() -> Generator[None]:
    signal.setitimer(signal.ITIMER_PROF, COMPILE_CPU_S)  # its signal ends the process
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    if not sys.platform.startswith("linux"):
        return
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + COMPILE_BYTES, used + COMPILE_BYTES))


if __name__ == "__main__":
    main(sys.argv[1])
