"""Calls of tools as each family's models write them, and templates by which the families are known."""

import json

from tests.support import chat_templates

PARAMETERS = {"f": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": "array"}}}
CALLS = [("f", {"a": 1, "b": "x <y> & z", "c": ["d"]}), ("g", {})]

TEMPLATES = {
    "hermes": chat_templates.QWEN3 + "<think>",
    "qwen3.5": chat_templates.QWEN3_5,
    "llama3": chat_templates.LLAMA3,
    "mistral": chat_templates.MISTRAL + "[THINK]",
    "deepseek": "<｜tool▁calls▁begin｜> <think>",
    "glm": "<tool_call><arg_key> <think>",
    "gpt-oss": "<|channel|>",
    "seed": "<seed:tool_call><function= <seed:think>",
    "plain": "{{ messages }}",
}


def hermes(calls):
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': values})}\n</tool_call>" for name, values in calls
    )


def functions(calls, tag="tool_call"):
    def value(item):
        return item if isinstance(item, str) else json.dumps(item)

    return "\n".join(
        f"<{tag}>\n<function={name}>\n"
        + "".join(f"<parameter={key}>\n{value(item)}\n</parameter>\n" for key, item in values.items())
        + f"</function>\n</{tag}>"
        for name, values in calls
    )


def glm(calls):
    def value(item):
        return item if isinstance(item, str) else json.dumps(item)

    return "\n".join(
        f"<tool_call>{name}\n"
        + "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value(item)}</arg_value>\n" for key, item in values.items())
        + "</tool_call>"
        for name, values in calls
    )


def deepseek(calls, fenced):
    inner = "".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json.dumps(values)}\n```<｜tool▁call▁end｜>"
        if fenced
        else f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(values)}<｜tool▁call▁end｜>"
        for name, values in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def mistral(calls, listed):
    if listed:
        return "[TOOL_CALLS]" + json.dumps([{"name": name, "arguments": values} for name, values in calls])
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(values)}" for name, values in calls)


def llama(calls, tag=""):
    return tag + "; ".join(json.dumps({"name": name, "parameters": values}) for name, values in calls)


def harmony(calls):
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{json.dumps(values)}<|call|>"
        for name, values in calls
    )
