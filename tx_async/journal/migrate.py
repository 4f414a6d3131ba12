"""Schema migrations: `schemas/<database>/NNNN_<name>.sql`, run in order and forward only, equal numbers for every
database.

Drivers run them, each in one transaction with its row in `schema_version`, so that a crash leaves a schema that is
either before or after a migration.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from msgspec import Struct

from tx_async.errors import ConfigError

Database = Literal["sqlite", "postgres"]

CREATE_SCHEMA_VERSION = "CREATE TABLE IF NOT EXISTS schema_version (number INTEGER PRIMARY KEY, name TEXT NOT NULL)"
READ_SCHEMA_VERSION = "SELECT coalesce(max(number), 0) FROM schema_version"


class Migration(Struct, frozen=True):
    number: int
    name: str
    sql: str


def schemas_dir() -> Path:
    """`tx_async/schemas` in an installed wheel, `schemas/` of the repository in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "schemas", package.parent / "schemas"):
        if (folder / "sqlite").is_dir():
            return folder
    raise ConfigError(
        f"The schemas are missing: neither {package / 'schemas'} nor {package.parent / 'schemas'} is there."
    )


def read_migrations(database: Database, schemas: Path | None = None) -> list[Migration]:
    """All migrations for a database, in ascending order, numbered from 1 without gaps."""
    folder = (schemas or schemas_dir()) / database
    migrations = sorted((_read(path) for path in folder.glob("*.sql")), key=lambda migration: migration.number)
    numbers = [migration.number for migration in migrations]
    if not numbers or numbers != list(range(1, len(numbers) + 1)):
        raise ConfigError(f"The migrations in {folder} are not numbered from 1 without gaps: {numbers}.")
    return migrations


def pending(database: Database, current: int, schemas: Path | None = None) -> list[Migration]:
    """The migrations that a database at version `current` still needs. Raises `ConfigError` when a newer server has
    migrated it."""
    migrations = read_migrations(database, schemas)
    if current > len(migrations):
        raise ConfigError(
            f"The journal has schema version {current}; this server knows versions up to {len(migrations)}. "
            "Run the newer server that migrated it, or restore a backup."
        )
    return migrations[current:]


def _read(path: Path) -> Migration:
    match = re.fullmatch(r"(\d{4})_(\w+)\.sql", path.name)
    if match is None:
        raise ConfigError(f"{path} is not named NNNN_<name>.sql.")
    return Migration(int(match[1]), match[2], path.read_text())
