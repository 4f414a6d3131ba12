"""Whether what a grammar leads into can come to an end. llguidance does not say so: it begins an answer that can only
run on, or stick in its middle. But it prints the rules that it has made of a grammar, and they are enough to tell.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from tx_async.grammar import GrammarError, Vocabulary, new_matcher

Rules = Mapping[str, Sequence[Sequence[str]]]
"""The name of a rule -> its alternatives, each the names of what follows on each other; the first rule is the answer's.
A name that is no rule's is a text."""
_HEAD, _ARROW, _EMPTY = "Grammar:", " ⇦ ", "ϵ"
_PRINTS = 3
"""llguidance's log level at which it prints the rules of large grammars, too, on the process's standard error."""
_REF = "json-schema:///"
"""How the names of a schema's definitions begin. The other names are not those that the sender wrote."""


def check_ends(vocabulary: Vocabulary, grammar: str) -> None:
    """Raises `GrammarError` for a grammar that compiles, but may lead into a rule that has no end. It takes away the
    process's standard error meanwhile."""
    if found := dead(rules_of(_printed(vocabulary, grammar))):
        where = next((f" ({name.removeprefix(_REF)})" for name in found if name.startswith(_REF)), "")
        raise GrammarError(f"no text ends what it leads into: a rule or a $ref{where} always leads back to itself.")


def _printed(vocabulary: Vocabulary, grammar: str) -> str:
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            new_matcher(vocabulary, grammar, log_level=_PRINTS)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return file.read().decode(errors="replace")


def rules_of(printed: str) -> Rules:
    """Empty where another version of llguidance prints them in another way."""
    rules: dict[str, list[list[str]]] = {}
    name = ""
    for line in _first_grammar(printed):
        left, _, right = line.partition(_ARROW)
        name = left.strip() or name
        words = right.split("  ")[0].split()
        rules.setdefault(name, []).append([word for word in words if word != _EMPTY])
    return rules


def _first_grammar(printed: str) -> Iterator[str]:
    """The lines with rules of the first of the grammars: the second one is the same, made smaller."""
    lines = iter(printed.splitlines())
    for line in lines:
        if line == _HEAD:
            break
    for line in lines:
        if not line.strip():
            return
        if _ARROW in line:
            yield line


def dead(rules: Rules) -> list[str]:
    """The rules that an answer may come to and that no text ends, in the order of the grammar."""
    reached, alive = _reached(rules), _alive(rules)
    return [name for name in rules if name in reached and name not in alive]


def _alive(rules: Rules) -> set[str]:
    """The rules that some text ends: one of their alternatives has only such rules, and texts."""
    waits: dict[str, list[tuple[str, set[str]]]] = {}
    alive: set[str] = set()
    ready: list[str] = []
    for name, ways in rules.items():
        for way in ways:
            missing = {part for part in way if part in rules}
            for part in missing:
                waits.setdefault(part, []).append((name, missing))
            if not missing:
                ready.append(name)
    while ready:
        if (ended := ready.pop()) in alive:
            continue
        alive.add(ended)
        for name, missing in waits.get(ended, ()):
            missing.discard(ended)
            if not missing:
                ready.append(name)
    return alive


def _reached(rules: Rules) -> set[str]:
    reached: set[str] = set()
    left = list(rules)[:1]
    while left:
        name = left.pop()
        if name in rules and name not in reached:
            reached.add(name)
            left += [part for way in rules[name] for part in way]
    return reached
