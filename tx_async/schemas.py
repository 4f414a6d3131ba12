"""The generated files of a checkout: `tx-async schemas` writes them, `--check` (and a test) says which are stale.

- `schemas/worker/messages.json`: JSON Schema of every message between server and worker, and of its envelope
- `schemas/worker/examples.json`: one example of each, as JSON and as the bytes of its header frame
- `schemas/openapi.json`: the HTTP API
- the tables in `schemas/*.md`, each between `<!-- table: NAME -->` and `<!-- end -->`
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tx_async.api import openapi
from tx_async.api.routes import ROUTES
from tx_async.config import ServerConfig
from tx_async.dispatch.frames import EnvelopeFromWorker, EnvelopeToWorker, encode
from tx_async.errors import ConfigError
from tx_async.field_docs import field_docs
from tx_async.testing import messages
from tx_async.wire.worker import PROTOCOL_VERSION, EngineConfig

ROOT = Path(__file__).resolve().parents[1]
REFERENCES = "#/$defs/{name}"
TABLE = re.compile(r"(<!-- table: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


Rows = Sequence[tuple[str, str, str]]


def run(check: bool, commands: Rows) -> int:
    """Write stale files, or with `check` only name them. Returns 1 when files were stale and still are.

    commands: for each command of the command line its name, what it does, and its flags.
    """
    if not (ROOT / "schemas").is_dir() or not (ROOT / "README.md").exists():
        raise ConfigError(f"{ROOT} is not a checkout of tx_async: only a checkout has generated files to write.")
    stale = stale_files(commands)
    for path, content in stale.items():
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        print(f"{'stale' if check else 'wrote'} {path.relative_to(ROOT)}", file=sys.stderr if check else sys.stdout)
    return 1 if check and stale else 0


def stale_files(commands: Rows) -> dict[Path, str]:
    """Path -> the right content, for each file whose content is different."""
    return {path: content for path, content in generated_files(commands).items() if _read(path) != content}


def generated_files(commands: Rows) -> dict[Path, str]:
    tables = {**TABLES, "commands": lambda: _table(("command", "what it does", "flags"), commands)}
    return {
        ROOT / "schemas/worker/messages.json": _json(worker_schema()),
        ROOT / "schemas/worker/examples.json": _json(worker_examples()),
        ROOT / "schemas/openapi.json": openapi.render().decode(),
        **{path: fill_tables(path.name, path.read_text(), tables) for path in sorted((ROOT / "schemas").glob("*.md"))},
    }


def worker_schema() -> dict[str, Any]:
    roots, definitions = msgspec.json.schema_components([EnvelopeToWorker, EnvelopeFromWorker], ref_template=REFERENCES)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"tx_async worker protocol, version {PROTOCOL_VERSION}",
        "description": "Header frames are these envelopes in msgpack. A ROUTER at the server, a DEALER at the worker.",
        "oneOf": list(roots),
        "$defs": _ordered_sets(definitions),
    }


def worker_examples() -> dict[str, Any]:
    """An envelope for every message: what `dispatch/frames.py` puts into the header frame, readable and as bytes."""
    return {
        "protocol_version": PROTOCOL_VERSION,
        "to_worker": [_example(EnvelopeToWorker(message)) for message in messages.to_worker()],
        "from_worker": [_example(EnvelopeFromWorker(message)) for message in messages.from_worker()],
    }


def _example(envelope: EnvelopeToWorker | EnvelopeFromWorker) -> dict[str, Any]:
    return {"message": msgspec.to_builtins(envelope.message), "header": encode(envelope).hex()}


# ---- tables of the reference pages


def fill_tables(page: str, text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """A page with every table rewritten. Raises `ConfigError` for an unknown table."""

    def fill(match: re.Match[str]) -> str:
        if (table := tables.get(match["name"])) is None:
            raise ConfigError(f"{page} asks for an unknown table {match['name']!r}; known: {', '.join(tables)}.")
        return f"{match[1]}{table()}\n{match[3]}"

    return TABLE.sub(fill, text)


def _settings_table(struct: type[msgspec.Struct], prefix: str) -> str:
    rows = [(f"`{prefix}{doc.name}`", _default(doc.default), doc.doc) for doc in field_docs(struct)]
    return _table(("setting", "default", "meaning"), rows)


def _routes_table() -> str:
    return _table(("", "route", ""), [(row.method, f"`{row.path}`", row.summary) for row in ROUTES])


TABLES: dict[str, Callable[[], str]] = {
    "settings": lambda: _settings_table(ServerConfig, ""),
    "backend-config": lambda: _settings_table(EngineConfig, ""),
    "routes": _routes_table,
}


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _default(value: Any) -> str:
    if isinstance(value, msgspec.Struct):
        return "below"
    if type(value) is int and value >= 2**20 and value % 2**20 == 0:
        return f"{value // 2**30} GiB" if value % 2**30 == 0 else f"{value // 2**20} MiB"
    return f"`{msgspec.json.encode(value).decode()}`"


def _json(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=1).decode() + "\n"


def _ordered_sets(schema: Any) -> Any:
    """The schema with the defaults of sets in a fixed order: Python's own order changes from process to process."""
    if isinstance(schema, dict):
        ordered = {key: _ordered_sets(value) for key, value in schema.items()}
        default = ordered.get("default")
        if isinstance(default, list) and all(isinstance(item, str) for item in default):
            ordered["default"] = sorted(default)
        return ordered
    return [_ordered_sets(item) for item in schema] if isinstance(schema, list | tuple) else schema


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
