"""Where a policy server is, and what is shown and trusted there: its address, a key, certificates."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "LIGHTVLA_API_KEY"
"""Environment variable of the key, where none is given."""

_LOCAL = ("localhost", "127.0.0.1", "::1")


def check_url(url: str) -> None:
    """Raises ValueError for what is not the address of a websocket."""
    expected = "expected ws://host:port or wss://host:port"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{url!r} is no address ({error}); {expected}") from error
    if parts.scheme not in ("ws", "wss") or not host or any(sign.isspace() for sign in url):
        raise ValueError(f"{url!r} is no address of a websocket; {expected}")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"the address of {host} names a user or a password, which results would show; leave them out")


def key_headers(url: str, key: str | None) -> dict[str, str]:
    """The header with the key that was given, else with that of the environment, if there is one; else no header.

    Raises ValueError for what cannot be a key, without repeating it.
    """
    key = os.environ.get(API_KEY_VARIABLE) if key is None else key
    if not key:
        return {}
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("the key has spaces or letters beyond ASCII; expected one word, as the server was given it")
    parts = urlsplit(url)
    if parts.scheme == "ws" and parts.hostname not in _LOCAL:
        logger.warning("the key goes to %s unencrypted, for all on the way to read; use wss", parts.hostname)
    return {"Authorization": f"Api-Key {key}"}


def tls_context(url: str, tls: str | Path | ssl.SSLContext | None) -> ssl.SSLContext | None:
    """What encrypts the connection; None where the system's own trust does, or nothing.

    Raises ValueError for a file without certificates, and for an address that is not encrypted.
    """
    if tls is None or isinstance(tls, ssl.SSLContext):
        if tls is not None and urlsplit(url).scheme != "wss":
            raise ValueError(f"tls for {url}, which is not encrypted; expected wss://host:port")
        return tls
    try:
        return tls_context(url, ssl.create_default_context(cafile=tls))
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"{tls} is no file of certificates ({error}); expected PEM") from error
