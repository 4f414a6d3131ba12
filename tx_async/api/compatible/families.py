"""Which family of models a chat template belongs to, and how that family writes calls and reasoning."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass

from tx_async.api.compatible.call_formats import read_deepseek, read_functions, read_glm, read_hermes, read_mistral
from tx_async.api.compatible.harmony import MARKS as HARMONY_MARKS
from tx_async.api.compatible.harmony import HarmonyParser
from tx_async.api.compatible.parsing import Parameters, Parser, Read, TagParser, Tags, read_nothing
from tx_async.api.compatible.whole_message import WholeMessageParser

THINK = ("<think>", "</think>")
_MISTRAL_ID_CHARACTERS = 9
_CALL_ID_CHARACTERS = 24


NO_TAGS = Tags()


@dataclass(frozen=True)
class Family:
    name: str
    tags: Tags = NO_TAGS
    marks: tuple[str, ...] = ()
    """Markers that may be special tokens of the tokenizer and that the parser must see."""
    has_tools: bool = False
    id_characters: int = _CALL_ID_CHARACTERS

    def parser(self, parameters: Parameters, *, with_tools: bool, prompt: str) -> Parser:
        if self.name == "gpt-oss":
            return HarmonyParser(with_tools)
        if self.name == "llama3":
            return WholeMessageParser(with_tools)
        in_reasoning = self.tags.thinks is not None and prompt.rstrip().endswith(self.tags.thinks[0])
        return TagParser(self.tags, parameters, with_tools=with_tools, in_reasoning=in_reasoning)

    def new_call_id(self, prefix: str) -> str:
        """A new id in the family's own form, where it has one."""
        alphabet = string.ascii_letters + string.digits
        text = "".join(secrets.choice(alphabet) for _ in range(self.id_characters))
        return text if self.id_characters == _MISTRAL_ID_CHARACTERS else prefix + text


def family_of(template: str, has_token: Callable[[str], bool] = lambda text: False) -> Family:
    """The family by what its template writes; fine-tuned models keep their family's template."""
    if "<|channel|>" in template:
        return Family("gpt-oss", Tags(thinks=("", "")), HARMONY_MARKS, has_tools=True)
    name, calls, read = _calls_of(template)
    thinks = _thinks_of(template, has_token)
    marks = (*(thinks or ()), *(mark for mark in calls or () if mark), *_MORE_MARKS.get(name, ()))
    length = _MISTRAL_ID_CHARACTERS if name == "mistral" else _CALL_ID_CHARACTERS
    return Family(name, Tags(thinks, calls, read), marks, name != "plain", length)


def _thinks_of(template: str, has_token: Callable[[str], bool]) -> tuple[str, str] | None:
    for pair in (THINK, ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]")):
        if pair[0] in template or has_token(pair[0]):
            return pair
    return None


def _calls_of(template: str) -> tuple[str, tuple[str, str] | None, Read]:
    """(the format's name, the tags around calls, the function that reads them)."""
    if "<seed:tool_call>" in template:
        return "seed", ("<seed:tool_call>", "</seed:tool_call>"), read_functions
    if "<arg_key>" in template:
        return "glm", ("<tool_call>", "</tool_call>"), read_glm
    if "<function=" in template and "<tool_call>" in template:
        return "qwen3.5", ("<tool_call>", "</tool_call>"), read_functions
    if "<tool_call>" in template:
        return "hermes", ("<tool_call>", "</tool_call>"), read_hermes
    if "<｜tool▁calls▁begin｜>" in template:
        return "deepseek", ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), read_deepseek
    if "[TOOL_CALLS]" in template:
        return "mistral", ("[TOOL_CALLS]", ""), read_mistral
    if "<|python_tag|>" in template or "ipython" in template:
        return "llama3", None, read_nothing
    return "plain", None, read_nothing


_MORE_MARKS = {
    "deepseek": ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    "mistral": ("[ARGS]", "[CALL_ID]"),
    "llama3": ("<|python_tag|>",),
    "glm": ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
}
