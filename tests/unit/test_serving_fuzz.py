"""Thousands of ways to send nonsense: none brings the server down, makes it fail, or fills its memory."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from reward_servers import expected, item, noise, process, ready

from calibri_lightning.serving.protocol import CheckReply, ErrorReply, PromptText, ScoreReply, content_hash

TOKEN = "0123456789abcdef"
LIMIT = 2**20
FUZZ = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
PATHS = ("/v1/score", "/v1/check")


class Server:
    """A server in a process, which is asked over one connection while that lasts."""

    def __init__(self, url: str, pid: int) -> None:
        self.url, self.pid, self.count = url, pid, 0
        self.connection = self.connect()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)

    def send(self, method: str, path: str, body: Any, headers: dict[str, Any]) -> tuple[int, bytes]:
        self.count += 1
        reused = self.connection.sock is not None
        try:
            self.connection.request(method, path, body, headers)
            answer = self.connection.getresponse()
            status, content = answer.status, answer.read()
        except (BrokenPipeError, ConnectionResetError, http.client.RemoteDisconnected):
            self.connection.close()
            # An idle connection may have been closed in the meantime.
            return self.send(method, path, body, headers) if reused else (0, b"")
        except (ValueError, http.client.InvalidURL, UnicodeError):
            self.connection.close()  # Python's client does not send this
            return 0, b""
        if answer.will_close:
            self.connection.close()
        if method != "HEAD":
            check_answer(status, content)
        return status, content

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}", **headers}
        return self.send("POST", path, body, given)

    def raw(self, data: bytes) -> bytes:
        """Sends bytes as they are, and reads until the server ends the connection."""
        self.count += 1
        host, port = urlsplit(self.url).netloc.split(":")
        received = b""
        with socket.create_connection((host, int(port)), timeout=30) as plain:
            try:
                plain.sendall(data)
                plain.shutdown(socket.SHUT_WR)
                while chunk := plain.recv(65536):
                    received += chunk
            except ConnectionError:
                pass
        return received

    def resident_kib(self) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))

    def works(self) -> None:
        """Scores a picture rightly."""
        picture = noise(self.count)
        body = json.dumps({"reward": "toy", "items": [item(picture, "fine")]}).encode()
        status, content = self.post("/v1/score", body)
        assert status == 200
        (result,) = ScoreReply.model_validate_json(content).results
        assert result.scores["toy"] == expected(picture)
        assert result.hash == content_hash("toy", "1", picture, PromptText(text="fine"))


def check_answer(status: int, content: bytes) -> None:
    assert status < 500 or status == 503, content
    assert b"Traceback" not in content
    if status >= 400:
        ErrorReply.model_validate_json(content)
        assert len(content) < 1000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    arguments = ("--port", "0", "--max-body", "1", "--max-memory", "64", "--max-items", "8", "--batch-window-ms", "0")
    with process(*arguments, CALIBRI_REWARD_TOKEN=TOKEN, MALLOC_ARENA_MAX="2") as running:
        made = Server(ready(running), running.pid)
        for _ in range(20):
            made.works()
        # Bodies of the largest size once, so that what they leave behind is not counted as growth.
        for _ in range(5):
            made.post("/v1/score", b"x" * LIMIT)
        before = made.resident_kib()
        yield made
        made.works()
        assert made.resident_kib() - before < 24 * 1024
        assert running.poll() is None
        running.terminate()
        assert running.wait(30) == 0
        errors = running.stderr.read() if running.stderr else ""
        assert "Traceback" not in errors, errors[:3000]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["reward", "items", "exact", "picture", "prompt", "codec", "dtype", "shape", "data", "text", "metadata", "prompts"]
)


def mangled(value: Any) -> st.SearchStrategy[Any]:
    """A message with some of its parts replaced, removed, doubled or added."""
    if isinstance(value, dict):
        fields = {key: mangled(part) for key, part in value.items()}
        whole = st.fixed_dictionaries({}, optional=fields) | st.fixed_dictionaries(fields)
        more = st.tuples(whole, st.dictionaries(KEYS | st.text(max_size=5), JSON, min_size=1, max_size=2))
        return st.one_of(whole, whole, whole, more.map(lambda pair: {**pair[0], **pair[1]}), JSON)
    if isinstance(value, list):
        whole = st.tuples(*map(mangled, value)).map(list)
        return st.one_of(whole, whole, whole, whole.map(lambda parts: parts * 2), st.just([]), JSON)
    return st.one_of(st.just(value), st.just(value), st.just(value), JSON)


def number_words() -> st.SearchStrategy[str]:
    return st.sampled_from(
        ["NaN", "Infinity", "-Infinity", "1e999", "-0", "1e-999", "9" * 4000, "9" * 5000, "0x10", "01", "1.", "-"]
    )


def file_of(side: int, kind: str, mode: str = "RGB") -> str:
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def bomb() -> str:
    """A PNG whose compressed text is far larger than the file."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    plain = buffer.getvalue()
    text = b"zTXt" + b"k\x00\x00" + zlib.compress(b"\0" * 50_000_000, 9)
    chunk = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
    return base64.b64encode(plain[:33] + chunk + plain[33:]).decode()


SIDES = st.sampled_from([0, 1, 2, 3, 5, 300, 4096, 10**5, 2**31, 2**63, 10**30, -1])
DATA = st.one_of(
    st.binary(max_size=60).map(lambda data: base64.b64encode(data).decode()),
    st.text(max_size=30),
    st.sampled_from(["=", "====", "AA", "AAAA" * 4, "AAA\n", "🙂", "\x00"]),
    st.sampled_from([file_of(2, "PNG"), file_of(2, "WEBP"), file_of(2, "JPEG"), file_of(4000, "PNG"), bomb()]),
    st.sampled_from([file_of(2, "PNG", "RGBA"), file_of(2, "GIF", "P"), file_of(2, "TIFF"), file_of(2, "PNG")[:40]]),
)
PICTURES = st.fixed_dictionaries(
    {
        "codec": st.sampled_from(["raw", "png", "webp-lossless", "jpeg", "gif"]),
        "shape": st.one_of(st.just([2, 2, 3]), st.lists(SIDES, max_size=5)),
        "data": DATA,
    },
    optional={"dtype": st.sampled_from(["uint8", "float32", "int8"])},
)
METADATA = st.dictionaries(st.text(max_size=5), JSON, max_size=2)
PROMPTS = st.fixed_dictionaries({}, optional={"text": st.text(max_size=20), "metadata": METADATA})
ITEMS = st.fixed_dictionaries({"picture": PICTURES}, optional={"prompt": PROMPTS})
SCORE = st.fixed_dictionaries(
    {"reward": st.sampled_from(["toy", "toy", "toy", "", "other"]), "items": st.lists(ITEMS, max_size=10)},
    optional={"exact": st.booleans() | st.sampled_from(["yes", 1, None])},
)


def encode(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@FUZZ
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=300))
def test_random_bytes(server: Server, path: str, body: bytes) -> None:
    assert server.post(path, body)[0] == 422


@FUZZ
@given(data=st.data())
def test_messages_with_parts_of_wrong_types(server: Server, data: st.DataObject) -> None:
    good = {"reward": "toy", "items": [item(noise(0), "a")], "exact": False}
    good["items"][0]["prompt"]["metadata"] = {"k": [1, {"b": None}]}  # type: ignore[index]
    status, content = server.post("/v1/score", encode(data.draw(mangled(good))))
    assert status in (200, 404, 413, 422)
    if status == 200:
        ScoreReply.model_validate_json(content)


@FUZZ
@given(body=SCORE)
def test_requests_made_after_the_schema(server: Server, body: Any) -> None:
    status, content = server.post("/v1/score", encode(body))
    assert status in (200, 404, 413, 422)
    if status == 200:
        assert len(ScoreReply.model_validate_json(content).results) == len(body["items"])


@FUZZ
@given(prompts=st.lists(PROMPTS, max_size=5), reward=st.sampled_from(["toy", "toy", "x\0", "é"]))
def test_checks_made_after_the_schema(server: Server, prompts: Any, reward: str) -> None:
    status, content = server.post("/v1/check", encode({"reward": reward, "prompts": prompts}))
    assert status in (200, 404, 422)
    if status == 200:
        CheckReply.model_validate_json(content)


@FUZZ
@given(cut=st.integers(0, 200), number=number_words(), place=st.sampled_from(["shape", "metadata", "exact", "reward"]))
def test_odd_numbers_and_truncated_json(server: Server, cut: int, number: str, place: str) -> None:
    good = {"reward": "toy", "items": [item(noise(0), "a")], "exact": False}
    words = encode(good)
    server.post("/v1/score", words[:cut])
    target: Any = {
        "shape": good["items"][0]["picture"]["shape"],  # type: ignore[index]
        "metadata": good["items"][0]["prompt"].setdefault("metadata", {}),  # type: ignore[index]
    }.get(place, good)
    if isinstance(target, list):
        target[0] = "HERE"
    else:
        target[place] = "HERE"
    status, _ = server.post("/v1/score", encode(good).replace(b'"HERE"', number.encode()))
    assert status in (200, 413, 422)


@FUZZ
@given(depth=st.integers(1, 100_000), opening=st.sampled_from(['{"a":', "[", '[{"a":']), path=st.sampled_from(PATHS))
def test_deep_nesting(server: Server, depth: int, opening: str, path: str) -> None:
    nested = (opening * min(depth, LIMIT // 8)).encode()
    assert server.post(path, nested)[0] == 422
    closed = nested + b"1" + b"".join({"{": b"}", "[": b"]"}.get(sign, b"") for sign in reversed(opening)) * depth
    body = b'{"reward": "toy", "prompts": [{"metadata": {"x": ' + closed + b"}}]}"
    assert server.post("/v1/check", body)[0] in (200, 413, 422)


@FUZZ
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW"]),
    path=st.sampled_from(["/", "/v1/score", "/v1/check", "/v1/rewards", "/health", "/metrics", "/openapi.json", "*"])
    | st.text("abc/.%20ff?#&=é\\;:@", max_size=20).map(lambda text: "/" + text),
    kind=st.sampled_from(["application/json", "text/plain", "application/x-pickle", "multipart/form-data", "", ";;="])
    | st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=20),
    token=st.sampled_from([TOKEN, TOKEN, TOKEN[:-1], TOKEN + "0", "", "\xff"]),
    headers=st.dictionaries(
        st.sampled_from(
            ["Host", "X-Forwarded-For", "Accept", "Cookie", "Expect", "Upgrade", "Content-Encoding", "Range"]
        ),
        st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30),
        max_size=3,
    ),
    body=st.none() | st.just(b"") | st.just(b"{}") | st.binary(max_size=40),
)
def test_wrong_methods_paths_types_tokens_and_headers(
    server: Server,
    method: str,
    path: str,
    kind: str,
    token: str,
    headers: dict[str, str],
    body: bytes | None,
) -> None:
    if headers.get("Upgrade") and headers.get("Expect"):
        del headers["Expect"]
    given_headers = {"Content-Type": kind, "Authorization": f"Bearer {token}", **headers}
    encoded = {name: value.encode("latin-1") for name, value in given_headers.items()}
    status, content = server.send(method, path, body, encoded)
    if token != TOKEN and status and path.partition("?")[0] != "/health":
        assert status in (400, 401), content


@FUZZ
@given(
    chunks=st.lists(st.integers(1, 400_000), min_size=1, max_size=6),
    announced=st.none() | st.sampled_from(["5", "0", "99999999", "-1", "1e3", "9" * 30]),
)
def test_chunked_bodies_over_the_limit(server: Server, chunks: list[int], announced: str | None) -> None:
    head = f"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n"
    if announced is None:
        head += "Transfer-Encoding: chunked\r\n"
        body = b"".join(f"{count:x}\r\n".encode() + b"x" * count + b"\r\n" for count in chunks) + b"0\r\n\r\n"
    else:
        head += f"Content-Length: {announced}\r\n"
        body = b"x" * min(chunks[0], 1000)
    received = server.raw(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    assert b"Traceback" not in received
    assert received[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 422")


@FUZZ
@given(data=st.binary(max_size=200), start=st.sampled_from([b"", b"GET /health HTTP/1.1\r\n", b"POST /v1/score "]))
def test_what_is_no_http(server: Server, data: bytes, start: bytes) -> None:
    received = server.raw(start + data)
    assert b"Traceback" not in received
    assert received[:10] in (b"", b"HTTP/1.1 4", b"HTTP/1.1 2")


def test_the_server_still_works(server: Server) -> None:
    server.works()
    assert requests.get(server.url + "/health", timeout=30).json()["status"] == "ready"
