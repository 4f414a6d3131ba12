"""The docstrings under the fields of a struct, as data: for `--help`, the tables in `schemas/`, and their tests."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import msgspec
from msgspec import Struct


class FieldDoc(Struct, frozen=True):
    name: str
    type: str
    default: Any
    doc: str
    """The docstring on one line; empty for a field whose name says everything."""


def field_docs(struct: type[Struct]) -> list[FieldDoc]:
    """Every field, in order."""
    annotations, docs = _read_source(struct)
    return [
        FieldDoc(field.name, annotations[field.name], _default(field), docs.get(field.name, ""))
        for field in msgspec.structs.fields(struct)
    ]


def _read_source(struct: type[Struct]) -> tuple[dict[str, str], dict[str, str]]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(struct))).body
    assert isinstance(definition, ast.ClassDef)
    annotations: dict[str, str] = {}
    docs: dict[str, str] = {}
    name = ""
    for statement in definition.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name)):
                annotations[name] = ast.unparse(statement.annotation)
            case ast.Expr(value=ast.Constant(value=str(text))) if name:
                docs[name] = " ".join(text.split())
            case _:
                name = ""
    return annotations, docs


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default
