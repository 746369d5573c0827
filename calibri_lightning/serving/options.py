"""What can be set about a server, and the command line's names for it."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

from calibri_lightning.errors import UserError
from calibri_lightning.serving.pictures import LOSSLESS
from calibri_lightning.serving.protocol import Codec, Limits

TOKEN_VARIABLE = "CALIBRI_REWARD_TOKEN"
"""The environment variable that holds the token, for servers and clients."""
_MEBIBYTE = 2**20
_SHORTEST_PUBLIC_TOKEN = 16


@dataclass(frozen=True)
class ServerOptions:
    """How a server listens, what it takes and how it batches.

    Attributes:
        host: Address to listen on; others than those of this machine need a token.
        port: Port; 0 takes a free one.
        token: What clients must show; None asks for nothing.
        max_batch: Most pictures of a call of a reward, unless a request asks for exact scores.
        batch_window_ms: How long a call waits for more pictures, milliseconds.
        max_queue: Most pictures that wait on one device.
        max_items: Most pictures of a request.
        max_pixels: Most pixels of a picture, frames counted.
        max_body_bytes: Most bytes of a request, and of its pictures when unpacked.
        max_memory_bytes: Most bytes of all requests being read, waiting or scored, packed and unpacked.
        allow_jpeg: Whether pictures may come as JPEG, which changes them.
        read_seconds: How long headers may take, and a body on top of 1 s for each 64 KiB.
        grace_seconds: How long running requests may take after a signal to end.
        certificate: TLS certificate chain, PEM.
        key: Its key, PEM.
    """

    host: str = "127.0.0.1"
    port: int = 8100
    token: str | None = field(default=None, repr=False)
    max_batch: int = 16
    batch_window_ms: float = 5.0
    max_queue: int = 4096
    max_items: int = 256
    max_pixels: int = 4096 * 4096
    max_body_bytes: int = 128 * _MEBIBYTE
    max_memory_bytes: int = 4096 * _MEBIBYTE
    allow_jpeg: bool = False
    read_seconds: float = 30.0
    grace_seconds: float = 60.0
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        """Refuses what makes no server.

        Raises:
            UserError: If an option is out of its range, or options contradict each other.
        """
        for name in ("max_batch", "max_items", "max_pixels", "max_body_bytes"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("batch_window_ms", "grace_seconds"):
            _check(0 <= getattr(self, name) <= 3600_000, name, getattr(self, name), "0 or more")
        _check(0 < self.read_seconds <= 3600, "read_seconds", self.read_seconds, "above 0 and at most 3600")
        _check(0 <= self.port <= 65535, "port", self.port, "0 (a free one) to 65535")
        _check(self.max_queue >= self.max_items, "max_queue", self.max_queue, f"at least max_items ({self.max_items})")
        least = 2 * self.max_body_bytes
        _check(self.max_memory_bytes >= least, "max_memory", self.max_memory_bytes, f"twice max_body ({least}) or more")
        if (self.certificate is None) != (self.key is None):
            raise UserError("TLS needs two files, and one is given. Give both --tls-certificate and --tls-key.")
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]+", self.token):
            raise UserError(
                "The token is empty or has characters that no HTTP header can carry. Use letters, digits and signs "
                "without spaces, for instance what `openssl rand -hex 24` prints."
            )

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """Codecs that are taken."""
        return (*LOSSLESS, "jpeg") if self.allow_jpeg else LOSSLESS

    @property
    def limits(self) -> Limits:
        """What a client is told."""
        return Limits(
            body_bytes=self.max_body_bytes, pixels=self.max_pixels, items=self.max_items, codecs=list(self.codecs)
        )

    def check_exposure(self) -> None:
        """Refuses to open a server to other machines without a token that cannot be guessed.

        Raises:
            UserError: If it would be open, or the host cannot be found.
        """
        if is_loopback(self.host):
            return
        if self.token is None:
            raise UserError(
                f"--host is {self.host}, which other machines can reach, and there is no token: anyone could use this "
                f"server. Set the environment variable {TOKEN_VARIABLE} or --token-file, or stay on 127.0.0.1."
            )
        if len(self.token) < _SHORTEST_PUBLIC_TOKEN:
            raise UserError(
                f"The token has {len(self.token)} characters; on {self.host}, which other machines can reach, it needs "
                f"{_SHORTEST_PUBLIC_TOKEN} or more. `openssl rand -hex 24` prints a good one."
            )


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone.

    Args:
        host: A name or an address.

    Returns:
        True if everything that it stands for is a loopback address.

    Raises:
        UserError: If there is no such host.
    """
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host is {host!r}, and there is no such host ({error}). Use 127.0.0.1 for this machine alone, or "
            "0.0.0.0 for all its addresses."
        ) from error
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def read_token(file: Path | None) -> str | None:
    """Reads the token; never from the command line, which all users of a machine can see.

    Args:
        file: A file that holds it; the environment variable otherwise.

    Returns:
        The token; None if there is none.

    Raises:
        UserError: If the file cannot be read, or the token is given twice.
    """
    found = os.environ.get(TOKEN_VARIABLE)
    if file is None:
        return found
    if found is not None:
        raise UserError(f"The token is given twice, by --token-file and by {TOKEN_VARIABLE}. Leave one out.")
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--token-file is {file}, which cannot be read ({error}). Name a file with the token."
        ) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every server to a command line.

    Args:
        parser: The command line.
    """
    add, default = parser.add_argument, ServerOptions()
    add("--host", default=default.host, help="address to listen on; other than loopback ones need a token")
    add("--port", type=int, default=default.port, help="port; 0 takes a free one and prints it")
    add(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"file with the token that clients must show; without it the environment variable {TOKEN_VARIABLE}",
    )
    add(
        "--max-batch",
        type=int,
        default=default.max_batch,
        help="most pictures of a call, but for exact requests, as fits send",
    )
    add(
        "--batch-window-ms",
        type=float,
        default=default.batch_window_ms,
        help="how long a call waits for pictures of other requests",
    )
    add("--max-queue", type=int, default=default.max_queue, help="most pictures that wait; more are answered 429")
    add("--max-items", type=int, default=default.max_items, help="most pictures of a request")
    add("--max-pixels", type=int, default=default.max_pixels, help="most pixels of a picture, frames counted")
    add("--max-body", type=int, default=default.max_body_bytes // _MEBIBYTE, help="largest request, MiB")
    add(
        "--max-memory",
        type=int,
        default=default.max_memory_bytes // _MEBIBYTE,
        help="all requests being read, waiting or scored, MiB; more are answered 429",
    )
    add("--allow-jpeg", action="store_true", help="take JPEG, which changes pictures and so their scores")
    add(
        "--read-seconds",
        type=float,
        default=default.read_seconds,
        help="how long headers may take, and a body on top of 1 s for each 64 KiB",
    )
    add(
        "--grace-seconds",
        type=float,
        default=default.grace_seconds,
        help="how long running requests may take after SIGTERM or SIGINT",
    )
    add("--tls-certificate", type=Path, metavar="FILE", help="certificate chain, PEM, to serve https")
    add("--tls-key", type=Path, metavar="FILE", help="its key, PEM")


def read_options(given: argparse.Namespace) -> ServerOptions:
    """Reads the options of every server from a parsed command line.

    Args:
        given: What the parser found.

    Returns:
        The options.

    Raises:
        UserError: If an option is out of its range, or the token cannot be read.
    """
    return ServerOptions(
        host=given.host,
        port=given.port,
        token=read_token(given.token_file),
        max_batch=given.max_batch,
        batch_window_ms=given.batch_window_ms,
        max_queue=given.max_queue,
        max_items=given.max_items,
        max_pixels=given.max_pixels,
        max_body_bytes=given.max_body * _MEBIBYTE,
        max_memory_bytes=given.max_memory * _MEBIBYTE,
        allow_jpeg=given.allow_jpeg,
        read_seconds=given.read_seconds,
        grace_seconds=given.grace_seconds,
        certificate=given.tls_certificate,
        key=given.tls_key,
    )


def _check(holds: bool, name: str, value: float, rule: str) -> None:
    if not holds:
        option = name.replace("_bytes", "").replace("_", "-")
        raise UserError(f"--{option} is {value}; it must be {rule}.")
