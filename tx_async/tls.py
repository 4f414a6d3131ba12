"""The server's certificate, from files that a renewal replaces while it runs."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from tx_async.errors import ConfigError

_log = logging.getLogger(__name__)

Version = tuple[tuple[int, int, int], ...]


class Certificate:
    """Every handshake checks whether the files have changed, with two system calls. New ones count from then on; a pair
    that cannot be used, because the renewal is half done or wrong, changes nothing."""

    def __init__(self, cert: str, key: str):
        """Raises `ConfigError`."""
        self.cert, self.key = str(Path(cert).expanduser()), str(Path(key).expanduser())
        try:
            self._version = self._look()
            self.load_into(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(f"tls_cert {self.cert} with tls_key {self.key} cannot be used: {error}.") from error
        #: the context made from newer files; None while the first ones count
        self._newer: ssl.SSLContext | None = None

    def __repr__(self) -> str:
        return f"<Certificate {self.cert}{', renewed' if self._newer else ''}>"

    def load_into(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self.cert, self.key, password=_no_passphrase)

    def follow(self, context: ssl.SSLContext) -> None:
        """Make handshakes of this context use the newest certificate."""
        context.sni_callback = self._on_hello

    def _on_hello(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        if self._has_changed():
            self._renew()
        if self._newer is not None:
            connection.context = self._newer

    def _has_changed(self) -> bool:
        try:
            version = self._look()
        except OSError:
            return False  # a file is being replaced
        is_new, self._version = version != self._version, version
        return is_new

    def _look(self) -> Version:
        stats = [Path(path).stat() for path in (self.cert, self.key)]
        return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats)

    def _renew(self) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            self.load_into(context)
        except (OSError, ValueError) as error:
            _log.warning(
                "tls_cert %s with tls_key %s cannot be used; the previous certificate stays: %s", *self._files, error
            )
            return
        self._newer = context
        _log.info("tls_cert %s and tls_key %s were read again.", *self._files)

    @property
    def _files(self) -> tuple[str, str]:
        return self.cert, self.key


def _no_passphrase() -> str:
    """Raise an error instead of asking on the terminal."""
    raise ValueError("the key has a passphrase; remove it with `openssl pkey`")
