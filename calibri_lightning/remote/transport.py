"""One HTTP exchange with one server: within time, within size, without surprises."""

from __future__ import annotations

import json
import queue
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.cookiejar import DefaultCookiePolicy
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from calibri_lightning.errors import UserError
from calibri_lightning.remote.errors import ExchangeError, cause_of, chain_of, sanitised
from calibri_lightning.remote.urls import Address
from calibri_lightning.remote.wire import HttpRequest

CONNECT_TIMEOUT = 5.0
"""Seconds until a connection must stand."""
_CHUNK = 65536
_ERROR_BYTES = 65536
_LONGEST_RETRY_AFTER = 30.0
_FIXES = {
    401: "The server wants its bearer token: put it into an environment variable and give the variable's name as "
    "token_env, or the path of a file as token_file.",
    403: "The server does not let this client in: check the token (token_env, token_file) and what stands before it.",
    404: "There is no such page: check the path in urls, and that `wire` names this kind of server.",
    413: "The request is too large: start the server with higher limits, or score fewer or smaller pictures at a time.",
    422: "The server does not understand the request: are client and server of the same version?",
}


class Transport:
    """Speaks HTTP to servers; threads share it."""

    def __init__(
        self,
        timeout: float = 120.0,
        token: str | None = None,
        ca_file: str | None = None,
        max_reply_bytes: int = 16 * 2**20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connects to nothing yet.

        Args:
            timeout: Seconds until an answer must begin, and again until it must have come.
            token: The bearer token that every request carries.
            ca_file: Certificates to trust instead of the public authorities.
            max_reply_bytes: Most bytes of a reply.
            clock: Tells the seconds.

        Raises:
            UserError: If there is no such file of certificates.
        """
        if ca_file is not None and not Path(ca_file).is_file():
            raise UserError(
                f"ca_file {ca_file!r} is no file; it holds the certificates to trust, in PEM. Check the path."
            )
        self._timeout, self._token, self._ca_file = timeout, token, ca_file
        self._max_reply_bytes, self._clock = max_reply_bytes, clock
        self._idle: queue.LifoQueue[requests.Session] = queue.LifoQueue()

    def connect(self, address: Address) -> None:
        """Opens a connection and closes it again: all that can be asked of some servers.

        Args:
            address: The server.

        Raises:
            ExchangeError: If there is none.
        """
        try:
            socket.create_connection((address.host, address.port), CONNECT_TIMEOUT).close()
        except OSError as error:
            raise ExchangeError("connection", f"no connection to {address.url} ({cause_of(error)})") from error

    def exchange(self, address: Address, request: HttpRequest, timeout: float | None = None) -> bytes:
        """Sends a request.

        Args:
            address: The server.
            request: What is sent.
            timeout: Seconds, instead of those of this transport.

        Returns:
            The body of the reply, whose status was 200.

        Raises:
            ExchangeError: If nothing comes back, or something else.
            UserError: If the server's answer is that this client is configured wrongly: 401, 403, 404, a redirect, or
                its certificate is not trusted.
        """
        seconds = timeout or self._timeout
        # What was sent, for messages.
        what = f"{request.method} {address.url}{request.path}"
        if request.body:
            what += f" ({len(request.body) / 1e6:.1f} MB)"
        try:
            with (
                self._session() as session,
                session.request(
                    request.method,
                    address.url + request.path,
                    data=request.body or None,
                    headers=self._headers(request),
                    stream=True,
                    allow_redirects=False,
                    timeout=(CONNECT_TIMEOUT, seconds),
                ) as response,
            ):
                if response.status_code == 200:
                    return self._read(response, what, self._max_reply_bytes, seconds)
                raise self._refusal(response, what, seconds)
        except (requests.ReadTimeout, ReadTimeoutError) as error:
            raise ExchangeError("timeout", f"{what} had no answer within {seconds:g} s") from error
        # ConnectTimeout is among them, and what urllib3 raises while a reply is read.
        except (requests.RequestException, HTTPError) as error:
            if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in chain_of(error)):
                raise UserError(
                    f"The certificate of {address.url} is not trusted ({cause_of(error)}). Give the file of the "
                    "certificate, or of the authority that signed it, as ca_file."
                ) from error
            raise ExchangeError("connection", f"{what} failed ({cause_of(error)})") from error

    @contextmanager
    def _session(self) -> Iterator[requests.Session]:
        """A session for one exchange, with the connections that it still has: one is not made for several threads."""
        try:
            session = self._idle.get_nowait()
        except queue.Empty:
            session = requests.Session()
            # Nothing of the environment: neither proxies nor the passwords of .netrc.
            session.trust_env = False
            session.verify = self._ca_file or True
            session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        try:
            yield session
        finally:
            self._idle.put(session)

    def _headers(self, request: HttpRequest) -> dict[str, str]:
        # identity: a small compressed reply could unpack into a huge one.
        headers = {"Accept-Encoding": "identity", "User-Agent": f"calibri-lightning/{version('calibri-lightning')}"}
        if request.body:
            headers["Content-Type"] = request.content_type
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        return headers

    def _read(self, response: requests.Response, what: str, limit: int, seconds: float) -> bytes:
        """Reads a body that may be endless, endlessly slow, or packed."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ExchangeError("garbage", f"{what} was answered with a compressed reply, which was not asked for")
        begun, parts, size = self._clock(), [], 0
        # read1 hands over what has come: `read` would wait for a whole chunk, however slowly it drips.
        while part := response.raw.read1(_CHUNK):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise ExchangeError("garbage", f"{what} was answered with more than {limit} bytes")
            if self._clock() - begun > seconds:
                raise ExchangeError("timeout", f"the answer to {what} had not all come within {seconds:g} s")
        return b"".join(parts)

    def _refusal(self, response: requests.Response, what: str, seconds: float) -> Exception:
        """What a status other than 200 means."""
        status = response.status_code
        if 300 <= status < 400:
            to = urlsplit(response.headers.get("Location", ""))
            place = self._safe(f"{to.scheme}://{to.hostname}{to.path}" if to.hostname else to.path)
            return UserError(
                f"{what} was redirected to {place or 'nowhere'}. Pictures and tokens are not sent on: give the "
                "server's own URL in urls."
            )
        message = f"{what} was answered with {status}: {self._said(response, what, seconds)}"
        if status in _FIXES:
            message += f". {_FIXES[status]}"
        if status in (401, 403, 404):
            return UserError(message)
        retry_after = _seconds(response.headers.get("Retry-After"))
        if status == 429:
            return ExchangeError("busy", message, retry_after)
        if status in (502, 503, 504):
            return ExchangeError("unavailable", message, retry_after)
        if status >= 500:
            return ExchangeError("failed", message)
        # Another 2xx says that all is well, but holds no scores.
        return ExchangeError("refused" if status >= 400 else "garbage", message)

    def _said(self, response: requests.Response, what: str, seconds: float) -> str:
        try:
            body = self._read(response, what, _ERROR_BYTES, min(seconds, CONNECT_TIMEOUT))
        except (ExchangeError, HTTPError):
            return "an unreadable body"
        text = body.decode(errors="replace")
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict):
            # `detail` is what FastAPI says.
            text = str(answer.get("error") or answer.get("detail") or text)
        if text.startswith("Traceback "):
            # Old servers send all of it; the last line says what went wrong.
            text = text.strip().splitlines()[-1]
        return self._safe(text).rstrip(".") or "nothing"

    def _safe(self, text: str) -> str:
        return sanitised(text, () if self._token is None else (self._token,))


def _seconds(header: str | None) -> float:
    """Reads a Retry-After; dates, which servers of models do not send, count as none."""
    text = (header or "").strip()
    return min(float(text), _LONGEST_RETRY_AFTER) if text.isascii() and text.isdigit() else 0.0
