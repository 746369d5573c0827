"""The gate in front of the server: who may ask, and how much may be sent, decided before and while a body is read."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calibri_lightning.serving.memory import MemoryLease
from calibri_lightning.serving.refusals import Refusal, busy, start_refusal
from calibri_lightning.serving.service import RewardService

OPEN_PATHS = ("/health",)
"""Paths that need no token and are served while the server loads or ends."""
_WHILE_NOT_READY = ("/health", "/metrics")
_SLOWEST_BYTES_PER_SECOND = 65536
_DRAIN_SECONDS = 5.0
LEASE = "calibri.lease"
"""Where the scope holds the request's `MemoryLease`."""
_log = logging.getLogger(__name__)


class Gate:
    """ASGI middleware: token, state, size and speed of bodies; counts answers, and lets no exception out."""

    def __init__(self, app: ASGIApp, service: RewardService, paths: Collection[str]) -> None:
        """Wraps an app.

        Args:
            app: The app.
            service: Its rewards.
            paths: What it serves; other paths are counted together.
        """
        self._app, self._service, self._paths = app, service, frozenset(paths)
        token = service.options.token
        self._token = None if token is None else _digest(token.encode("ascii"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request.

        Args:
            scope: What is asked.
            receive: The channel from the client.
            send: The channel to the client.
        """
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        lease, status, unread = MemoryLease(self._service.memory), 499, True

        async def watch() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body", False))
            return message

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._service.num_running += 1
        try:
            await self._answer({**scope, LEASE: lease}, watch, note)
        except Refusal as refusal:
            await start_refusal(note, refusal)
            if unread:
                await _drain(receive, self._service.options.max_body_bytes)
            await note({"type": "http.response.body", "body": b""})
        # The server's last moment; uvicorn would answer with a text. Nothing runs after this, so nothing is re-raised.
        except asyncio.CancelledError:
            if status == 499:
                await start_refusal(note, busy("The server is ending.", 1, 503))
                await note({"type": "http.response.body", "body": b""})
        except Exception:
            _log.exception("A request failed inside of the server")
            if status == 499:
                await start_refusal(note, Refusal(500, "The server failed; its log says how."))
                await note({"type": "http.response.body", "body": b""})
        finally:
            self._service.num_running -= 1
            lease.release()
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.requests.labels(path, str(status)).inc()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in OPEN_PATHS:
            self._check_sender(scope)
        if scope["path"] not in _WHILE_NOT_READY and self._service.status != "ready":
            raise busy(f"The server is {self._service.status}.", 1, 503)
        body = await self._read(scope, receive)
        if body is None:
            return
        first: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal first
            if first is None:
                return await receive()
            message, first = first, None
            return message

        del body
        await self._app(scope, replay, send)

    def _check_sender(self, scope: Scope) -> None:
        if self._token is not None:
            given = _values(scope, b"authorization")
            kind, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
            # Digests are of one length, which compare_digest would otherwise give away.
            same = hmac.compare_digest(_digest(token.strip()), self._token)
            if not same or kind.lower() != b"bearer":
                headers = {"WWW-Authenticate": "Bearer"}
                raise Refusal(401, "The token is missing or wrong: send 'Authorization: Bearer TOKEN'.", headers)
        # A page in a browser can reach a server on loopback under a name of its own (DNS rebinding).
        elif not all(self._is_this_machine(host) for host in _values(scope, b"host")):
            raise Refusal(401, "A server without a token answers only to this machine's own names, such as localhost.")

    def _is_this_machine(self, header: bytes) -> bool:
        host = header.decode("latin-1").lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name in ("localhost", self._service.options.host.lower()):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Reads the body; None if the client went away."""
        # What needs no token has no body, and so holds no memory either.
        has_body = scope["method"] == "POST" and scope["path"] not in OPEN_PATHS
        most = self._service.options.max_body_bytes if has_body else 0
        too_large = Refusal(413, f"The body is larger than {most} bytes, the most that is taken here.")
        announced = _values(scope, b"content-length")
        # The HTTP parser has made sure that it is one number of at most 20 digits.
        if announced and int(announced[0]) > most:
            raise too_large
        lease: MemoryLease = scope[LEASE]
        body, start = bytearray(), time.monotonic()
        while True:
            allowed = self._service.options.read_seconds + len(body) / _SLOWEST_BYTES_PER_SECOND
            try:
                message = await asyncio.wait_for(receive(), max(start + allowed - time.monotonic(), 0.001))
            except asyncio.TimeoutError:  # noqa: UP041 - another class in Python 3.10
                raise Refusal(408, "The body came too slowly.") from None
            if message["type"] == "http.disconnect":
                return None
            chunk: bytes = message.get("body", b"")
            if len(body) + len(chunk) > most:
                raise too_large
            lease.take(len(chunk))
            body += chunk
            if not message.get("more_body", False):
                return bytes(body)


async def _drain(receive: Receive, most: int) -> None:
    """Throws away what a client still sends: a closed connection would hide the answer from it."""
    end = time.monotonic() + _DRAIN_SECONDS
    while most > 0 and time.monotonic() < end:
        try:
            message = await asyncio.wait_for(receive(), max(end - time.monotonic(), 0.001))
        except asyncio.TimeoutError:  # noqa: UP041 - another class in Python 3.10
            return
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
        most -= len(message.get("body", b""))


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key.lower() == name]


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
