"""The journal that a configuration names."""

from __future__ import annotations

from tx_async.config import ServerConfig
from tx_async.errors import ConfigError
from tx_async.journal.journal import Driver, Journal


def open_journal(config: ServerConfig) -> Journal:
    """A journal for `config.database_url`, not opened yet (`await journal.open()`). Raises `ConfigError` for an unknown
    scheme.
    """
    if not config.database_url:
        return Journal(_sqlite(str(config.sqlite_file)))
    return Journal(driver_for(config.database_url, prepared_statements=config.database_prepared_statements))


def driver_for(url: str, *, prepared_statements: bool = True) -> Driver:
    """`sqlite:///absolute/path.db` (four slashes mean the same) or `postgresql://…`."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "sqlite":
        if not rest.startswith("/") or not rest.strip("/"):
            raise ConfigError(f"database_url {url!r} names no file: write sqlite:///absolute/path.db.")
        return _sqlite("/" + rest.lstrip("/"))
    if separator and scheme in ("postgresql", "postgres"):
        from tx_async.journal.postgres import PostgresDriver

        return PostgresDriver(url, prepared_statements=prepared_statements)
    raise ConfigError("database_url must begin with sqlite:/// or postgresql://.")


def _sqlite(path: str) -> Driver:
    from tx_async.journal.sqlite import SqliteDriver

    return SqliteDriver(path)
