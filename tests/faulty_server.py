"""A server of rewards in a thread that does what a test tells it: by default the right thing."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import numpy as np

from calibri_lightning.serving.pictures import unpack
from calibri_lightning.serving.protocol import (
    CheckReply,
    CheckRequest,
    Health,
    Limits,
    Result,
    RewardInfo,
    Roster,
    ScoreReply,
    ScoreRequest,
    content_hash,
)

INFO = RewardInfo(
    name="mean", model="tests:mean", revision="1", preprocessing="none", pixels="uint8", extra_names=["peak"]
)
LIMITS = Limits(body_bytes=2**20, pixels=10_000, items=64, codecs=["raw", "png", "webp-lossless"])


@dataclass
class Answer:
    """What goes back."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    """Instead of all the above: these bytes, and the end of the connection."""
    reset: bool = False
    """Ends the connection by a reset."""
    wait_for: threading.Event | None = None
    """Before anything is sent."""


Behaviour = Callable[["FaultyServer", bytes], Answer]


class FaultyServer:
    """Speaks version 1 of the protocol on 127.0.0.1; scores are means of pixels."""

    def __init__(
        self,
        info: RewardInfo = INFO,
        limits: Limits = LIMITS,
        token: str | None = None,
        certificate: tuple[str, str] | None = None,
    ) -> None:
        self.info, self.limits, self.token, self.certificate = info, limits, token, certificate
        self.script: dict[str, deque[Behaviour]] = {}
        self.asked: Counter[str] = Counter()
        self.requests: list[ScoreRequest] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http{'s' if self.certificate else ''}://127.0.0.1:{self._port}"

    @property
    def scored(self) -> int:
        """Requests for scores."""
        return self.asked["/v1/score"]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Listens, always on the same port."""
        owner = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            # Its requests may wait for a test's event: nobody waits for them.
            block_on_close = False

            def get_request(self) -> tuple[socket.socket, Any]:
                connection, address = super().get_request()
                owner.connections += 1
                owner._sockets.append(connection)
                return connection, address

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        class Handler(_Handler):
            faulty = owner

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        if self.certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        """Ends at once, with all connections."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._sockets.clear()

    def next(self, *behaviours: Behaviour | Answer, path: str = "/v1/score") -> None:
        """What it does at the next requests, before it is good again."""
        steps = [b if callable(b) else (lambda *_, answer=b: answer) for b in behaviours]
        self.script.setdefault(path, deque()).extend(steps)

    def answer(self, path: str, body: bytes) -> Answer:
        """The right answer, or that of the script."""
        steps = self.script.get(path)
        return steps.popleft()(self, body) if steps else self.right(path, body)

    def right(self, path: str, body: bytes) -> Answer:
        """The right answer."""
        if path == "/health":
            return json_answer(Health(status="ready"))
        if path == "/v1/rewards":
            return json_answer(Roster(rewards=[self.info], limits=self.limits))
        if path == "/v1/check":
            texts = [prompt.text for prompt in CheckRequest.model_validate_json(body).prompts]
            return json_answer(CheckReply(problem="no score for 'forbidden'" if "forbidden" in texts else None))
        return json_answer(self.reply(body))

    def right_scores(self, body: bytes) -> Answer:
        """The right answer to a request for scores."""
        return self.right("/v1/score", body)

    def reply(self, body: bytes) -> ScoreReply:
        """The right reply to a request for scores."""
        request = ScoreRequest.model_validate_json(body)
        self.requests.append(request)
        results = []
        for item in request.items:
            pixels = unpack(item.picture, self.limits.pixels, self.limits.codecs)
            mean = float(pixels.astype(np.float64).mean()) + len(item.prompt.text)
            named = content_hash(self.info.name, self.info.revision, pixels, item.prompt)
            scores = {name: float(pixels.max()) for name in self.info.extra_names}
            results.append(Result(scores={self.info.name: mean} | scores, hash=named))
        return ScoreReply(reward=self.info, results=results)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    faulty: FaultyServer

    def do_GET(self) -> None:
        self._handle(b"")

    def do_POST(self) -> None:
        self._handle(self.rfile.read(int(self.headers["Content-Length"])))

    def _handle(self, body: bytes) -> None:
        faulty = self.faulty
        faulty.asked[self.path] += 1
        faulty.headers.append(dict(self.headers.items()))
        if faulty.token is not None and self.headers.get("Authorization") != f"Bearer {faulty.token}":
            said = f"wrong token: {self.headers.get('Authorization')}"
            self._send(Answer(401, json.dumps({"protocol": 1, "error": said}).encode()))
            return
        self._send(faulty.answer(self.path, body))

    def _send(self, answer: Answer) -> None:
        if answer.wait_for is not None:
            answer.wait_for.wait(30)
        self.close_connection = answer.raw is not None or answer.reset
        if answer.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif answer.raw is not None:
            self.wfile.write(answer.raw)
        else:
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

    def log_message(self, *_: object) -> None:
        pass


def json_answer(message: Any, status: int = 200) -> Answer:
    return Answer(status, message.model_dump_json().encode())


def error(status: int, text: str = "no", headers: Iterable[tuple[str, str]] = ()) -> Answer:
    return Answer(status, json.dumps({"protocol": 1, "error": text}).encode(), dict(headers))


def altered(change: Callable[[dict[str, Any]], object]) -> Behaviour:
    """The right reply after a change of its JSON."""

    def behave(server: FaultyServer, body: bytes) -> Answer:
        reply = server.reply(body).model_dump()
        change(reply)
        return Answer(body=json.dumps(reply).encode())

    return behave
