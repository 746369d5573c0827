"""The socket a server listens on, and connections that may not dawdle."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from calibri_lightning.errors import UserError


def open_socket(host: str, port: int) -> socket.socket:
    """Binds a socket.

    Args:
        host: A name or an address; of several addresses the first is taken.
        port: The port; 0 for a free one.

    Returns:
        The socket, which does not listen yet.

    Raises:
        UserError: If the address is taken or not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        # With the protocol 0, asyncio would leave Nagle's algorithm on: 40 ms a request.
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise UserError(
            f"The server cannot listen on {host} port {port} ({error.strerror or error}). Choose another --port (0 "
            "takes a free one), or an address of this machine as --host."
        ) from error
    made.set_inheritable(False)
    return made


def url_of(listener: socket.socket, host: str, secure: bool) -> str:
    """The address that clients use.

    Args:
        listener: The socket.
        host: What it was bound to.
        secure: Whether it speaks TLS.

    Returns:
        A URL without a path.
    """
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if secure else 'http'}://{name}:{listener.getsockname()[1]}"


def hurried(seconds: float) -> type[H11Protocol]:
    """Makes a protocol that closes connections whose headers do not come in time: uvicorn waits for ever (0.54).

    Args:
        seconds: How long they may take.

    Returns:
        A protocol for `uvicorn.Config.http`.
    """

    class Hurried(H11Protocol):
        """HTTP/1.1 with a limit on the time that headers take."""

        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """Begins to wait for headers.

            Args:
                transport: The connection.
            """
            super().connection_made(transport)
            self._limit = self.loop.call_later(seconds, self._give_up)

        def data_received(self, data: bytes) -> None:
            """Takes bytes; waits for headers from the first of a request on.

            Args:
                data: The bytes.
            """
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self._limit is None:
                self._limit = self.loop.call_later(seconds, self._give_up)
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            """Waits no longer.

            Args:
                exc: Why the connection ended.
            """
            self._stop()
            super().connection_lost(exc)

        def _stop(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

        def _give_up(self) -> None:
            self._limit = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Hurried
