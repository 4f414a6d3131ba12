"""How a worker over tcp proves itself: with the shared token, and nothing else.

Both ends derive the server's CURVE key from the token. A peer that does not know the token cannot complete the
handshake, so it is told nothing at all, and what travels is encrypted. Workers on the server's own host come through
a socket file in a folder that only this user can enter.
"""

from __future__ import annotations

import functools
import hashlib
import hmac

import zmq
from zmq.utils import z85

from tx_async.errors import ConfigError

TOKEN_CHARACTERS_MIN = 16


@functools.lru_cache(maxsize=4)
def server_keys(token: str) -> tuple[bytes, bytes]:
    """The (public, secret) CURVE keys, in Z85, of a token. Slow on purpose (tens of ms), so that guessing is slow,
    too."""
    seed = hashlib.scrypt(token.encode(), salt=b"tx_async worker token", n=2**14, r=8, p=1, dklen=32)
    secret = z85.encode(seed)
    return zmq.curve_public(secret), secret


def secure_server(socket: zmq.Socket, token: str) -> None:
    """Let in only peers that know the token. Raises `ConfigError` when there is none, or one that can be guessed."""
    if len(token) < TOKEN_CHARACTERS_MIN:
        raise ConfigError(
            "worker_address lets workers attach over the network, so worker_token must be set, to at least "
            f"{TOKEN_CHARACTERS_MIN} characters that nobody can guess: "
            "python -c 'import secrets; print(secrets.token_hex())' makes one."
        )
    socket.curve_server = True
    socket.curve_secretkey = server_keys(token)[1]


def secure_client(socket: zmq.Socket, token: str) -> None:
    socket.curve_serverkey = server_keys(token)[0]
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()


def tokens_equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
