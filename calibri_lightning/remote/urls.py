"""Addresses of servers, and tokens for them."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from calibri_lightning.errors import UserError

_RULE = "the rule is http://host:port or https://host, with a path where one leads to the server"


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Attributes:
        url: Its URL, without a slash at the end.
        host: Name or number of its machine.
        port: Its port.
        encrypted: Whether TLS is spoken.
    """

    url: str
    host: str
    port: int
    encrypted: bool

    @property
    def on_this_machine(self) -> bool:
        """Whether it is reached by the loopback interface."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def addresses(urls: str | Sequence[str]) -> tuple[Address, ...]:
    """Reads the option `urls`.

    Args:
        urls: One URL, or several.

    Returns:
        The addresses, in this order.

    Raises:
        UserError: If one is no address of a server, or stands there twice.
    """
    given = [urls] if isinstance(urls, str) else urls
    if not isinstance(given, Sequence) or not given or not all(isinstance(url, str) for url in given):
        raise UserError(
            f"urls is {urls!r}; it is one URL or a list of them, for example urls: [http://127.0.0.1:8100]."
        )
    found = tuple(_address(url) for url in given)
    twice = [address.url for i, address in enumerate(found) if address in found[:i]]
    if twice:
        raise UserError(
            f"urls has {twice[0]} twice; each server stands there once. To send it several batches at a time, use "
            "per_server: 2."
        )
    return found


def _address(url: str) -> Address:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"The URL {_without_login(url)!r} cannot be read ({error}); {_RULE}.") from None
    if "@" in parts.netloc:
        # The URL ends up in logs, checkpoints and error messages.
        raise UserError(
            f"The URL {_without_login(url)!r} holds a name or a password; they would be written into logs. Take them "
            "out; for a token use token_env, the name of an environment variable, or token_file."
        )
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or url != url.strip():
        raise UserError(f"The URL {url!r} is not one of a server of rewards; {_RULE}.")
    encrypted = parts.scheme == "https"
    return Address(url.rstrip("/"), host, port or (443 if encrypted else 80), encrypted)


def _without_login(url: str) -> str:
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


@dataclass(frozen=True)
class TokenSource:
    """Where a bearer token is, so that it stands in no configuration.

    Attributes:
        env: Name of an environment variable.
        file: Path of a file that holds nothing else.
    """

    env: str | None = None
    file: str | None = None

    def read(self) -> str | None:
        """Fetches the token.

        Returns:
            The token; None if none is wanted.

        Raises:
            UserError: If it is not there, or is no token.
        """
        if self.env is not None and self.file is not None:
            raise UserError(f"token_env {self.env!r} and token_file {self.file!r} are both given; leave one out.")
        if self.env is not None:
            place, text = f"The environment variable {self.env!r} of token_env", os.environ.get(self.env)
            if text is None:
                raise UserError(
                    f"{place} is not set; token_env is the name of a variable that holds the token, not the token. "
                    "Set it where you start the run: read -rs TOKEN; export TOKEN."
                )
        elif self.file is not None:
            place = f"The file {self.file!r} of token_file"
            try:
                text = Path(self.file).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", None) or "it is not text"
                raise UserError(f"{place} cannot be read ({why}). Write the token into it, and nothing else.") from None
        else:
            return None
        token = text.strip()
        # Anything else could break out of the header; what it is stays unsaid.
        if not token or not token.isascii() or not all(c.isprintable() and c != " " for c in token):
            raise UserError(
                f"{place} holds no token; a token is one word of printable ASCII characters. Put the server's there."
            )
        return token
