"""The server over HTTP: what it answers, and what it refuses."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from reward_servers import Toy, expected, item, noise, served, until

from calibri_lightning.serving.pictures import pack
from calibri_lightning.serving.protocol import ErrorReply, PromptText, ScoreReply, content_hash

TOKEN = "0123456789abcdef"


def score(url: str, *items: Any, reward: str = "toy", **more: Any) -> requests.Response:
    return requests.post(url + "/v1/score", json={"reward": reward, "items": list(items), **more}, timeout=30)


def refused(answer: requests.Response, status: int, message: str) -> None:
    assert answer.status_code == status, answer.text
    assert message in ErrorReply.model_validate_json(answer.content).error
    assert answer.headers["Content-Type"] == "application/json"
    assert "Traceback" not in answer.text


def test_scores_come_in_order_with_the_hash_of_what_was_scored() -> None:
    pictures = [noise(0), noise(1, 2, 6, 3), noise(2), noise(3).astype(np.float32) / 255]
    with served(Toy()) as (url, _):
        packed = [item(picture, "x" * i) for i, picture in enumerate(pictures)]
        packed[2]["picture"] = pack(pictures[2], "webp-lossless").model_dump()
        reply = ScoreReply.model_validate_json(score(url, *packed).content)
    assert reply.reward.name == "toy"
    for i, (result, picture) in enumerate(zip(reply.results, pictures, strict=True)):
        assert result.scores == {"toy": expected(picture), "letters": i}
        assert result.hash == content_hash("toy", "1", picture, PromptText(text="x" * i))


def test_what_cannot_be_scored_is_null_and_says_so() -> None:
    with served(Toy()) as (url, _):
        results = score(url, item(noise(0), "nan"), item(noise(1))).json()["results"]
    assert results[0]["scores"]["toy"] is None
    assert results[0]["error"]
    assert results[1]["error"] is None


def test_exact_pictures_are_one_batch() -> None:
    toy = Toy()
    with served(toy, max_batch=2) as (url, _):
        assert score(url, *[item(noise(i), str(i)) for i in range(5)], exact=True).ok
        assert score(url, *[item(noise(i), str(i)) for i in range(5)]).ok
        refused(score(url, item(noise(0)), item(noise(0, 2, 2, 3)), exact=True), 422, "several shapes")
    assert toy.calls == [list("01234"), list("01"), list("23"), list("4")]


def test_prompts_are_checked_in_the_thread_that_scores() -> None:
    toy = Toy()
    with served(toy) as (url, _):

        def check(*texts: str) -> requests.Response:
            body = {"reward": "toy", "prompts": [{"text": text} for text in texts]}
            return requests.post(url + "/v1/check", json=body, timeout=30)

        assert check("fine").json() == {"protocol": 1, "problem": None}
        assert "bad one" in check("fine", "bad one").json()["problem"]
        refused(check("raise"), 500, "'toy' raised KeyError")
        assert score(url, item(noise(0))).ok
    assert len(toy.threads) == 1


def test_the_roster_names_rewards_and_limits() -> None:
    with served(Toy(), Toy("second"), max_items=7) as (url, _):
        roster = requests.get(url + "/v1/rewards", timeout=30).json()
        refused(score(url, item(noise(0)), reward="third"), 404, "there are toy, second")
    assert [info["name"] for info in roster["rewards"]] == ["toy", "second"]
    assert roster["limits"] == {
        "body_bytes": 128 * 2**20,
        "pixels": 4096**2,
        "items": 7,
        "codecs": ["raw", "png", "webp-lossless"],
    }


def test_rewards_of_one_device_share_a_thread_and_others_do_not() -> None:
    one, two, elsewhere = Toy("one"), Toy("two"), Toy("three", "cpu:1")
    with served(one, two, elsewhere) as (url, _):
        for name in ("one", "two", "three"):
            assert score(url, item(noise(0)), reward=name).ok
    assert one.threads == two.threads != elsewhere.threads


def test_requests_of_many_clients_are_batched_and_none_is_mixed_up() -> None:
    toy = Toy()
    with served(toy, max_batch=8, batch_window_ms=20) as (url, service), ThreadPoolExecutor(16) as clients:

        def ask(seed: int) -> None:
            picture = noise(seed)
            (result,) = score(url, item(picture, f"p{seed}")).json()["results"]
            assert result["scores"]["toy"] == expected(picture)
            assert result["hash"] == content_hash("toy", "1", picture, PromptText(text=f"p{seed}"))

        list(clients.map(ask, range(96)))
        # A request is counted once it is over, which its client may see first.
        until(lambda: b'requests_total{path="/v1/score",status="200"} 96.0' in service.metrics.render())
        families = {f.name: f for f in text_string_to_metric_families(service.metrics.render().decode())}
    assert sorted(text for call in toy.calls for text in call) == sorted(f"p{i}" for i in range(96))
    assert len(toy.calls) < 96
    assert max(map(len, toy.calls)) <= 8
    samples = {(s.name, tuple(s.labels.values())): s.value for f in families.values() for s in f.samples}
    assert samples["calibri_reward_items_total", ("toy",)] == 96
    assert samples["calibri_reward_batch_size_count", ("toy",)] == len(toy.calls)
    assert samples["calibri_reward_requests_total", ("/v1/score", "200")] == 96
    assert samples["calibri_reward_queue_length", ("cpu",)] == 0


def test_a_reward_that_raises_is_a_500_without_a_traceback() -> None:
    with served(Toy()) as (url, _):
        refused(score(url, item(noise(0), "raise")), 500, "The reward 'toy' raised ArithmeticError: no such picture")
        refused(score(url, item(noise(0), "short")), 500, "returned 0 scores under 'toy' for 1 pictures")
        assert score(url, item(noise(0))).ok


def test_nothing_but_health_answers_without_the_token() -> None:
    with served(Toy(), token=TOKEN) as (url, _):
        for path in ("/v1/rewards", "/metrics", "/openapi.json", "/nothing"):
            refused(requests.get(url + path, timeout=30), 401, "token")
            right = requests.get(url + path, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30)
            assert right.status_code == (404 if path == "/nothing" else 200)
        health = requests.get(url + "/health", timeout=30)
        assert health.json() == {"protocol": 1, "status": "ready"}
        wrong = ("", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, b"Bearer \xff\xfe", "Bearer é")
        for header in wrong:
            given = header.encode("latin-1") if isinstance(header, str) else header
            refused(requests.get(url + "/v1/rewards", headers={"Authorization": given}, timeout=30), 401, "token")
        # The token comes first: nothing of the body is looked at.
        refused(requests.post(url + "/v1/score", data=b"\xff" * 100_000, timeout=30), 401, "token")


def test_what_needs_no_token_takes_no_body() -> None:
    """Else anybody could fill the memory for requests."""
    with served(Toy(), token=TOKEN, max_body_bytes=2**20, max_memory_bytes=2**21) as (url, service):
        refused(requests.post(url + "/health", data=b"x" * 1000, timeout=30), 413, "larger than 0 bytes")
        host, port = urlsplit(url).netloc.split(":")
        open_ones = []
        for _ in range(4):
            waiting = socket.create_connection((host, int(port)), 30)
            head = f"POST /health HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1048576\r\n\r\n"
            waiting.sendall(head.encode() + b"x" * 1_000_000)
            open_ones.append(waiting)
        try:
            answer = requests.post(
                url + "/v1/score",
                json={"reward": "toy", "items": [item(noise(0))]},
                headers={"Authorization": f"Bearer {TOKEN}"},
                timeout=30,
            )
            assert answer.status_code == 200
            assert service.memory.free == 2**21
        finally:
            for waiting in open_ones:
                waiting.close()


def test_without_a_token_other_names_are_refused() -> None:
    with served(Toy()) as (url, _):
        for host, status in (("evil.example", 401), ("localhost:1", 200), ("[::1]:8100", 200), ("10.0.0.1", 401)):
            assert requests.get(url + "/v1/rewards", headers={"Host": host}, timeout=30).status_code == status


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_body_is_refused_while_it_comes(chunked: bool) -> None:
    def body() -> Any:
        for _ in range(40):
            yield b"x" * 50_000

    headers = {"Content-Type": "application/json"}
    with served(Toy(), max_body_bytes=100_000, max_items=1) as (url, service):
        data = body() if chunked else b"x" * 150_000
        if chunked:
            # More than twice the limit: whether the answer is still read is up to the network.
            with contextlib.suppress(requests.ConnectionError):
                refused(requests.post(url + "/v1/score", data=data, headers=headers, timeout=30), 413, "100000 bytes")
        else:
            refused(requests.post(url + "/v1/score", data=data, headers=headers, timeout=30), 413, "100000 bytes")
        refused(requests.get(url + "/health", data=b"x", timeout=30), 413, "0 bytes")
        assert score(url, item(noise(0))).ok
        until(lambda: service.num_running == 0)
        assert service.memory.free == service.options.max_memory_bytes


def test_a_body_announced_too_large_is_refused_before_it_comes() -> None:
    with served(Toy()) as (url, _):
        connection = connect(url)
        connection.putrequest("POST", "/v1/score")
        connection.putheader("Content-Length", "9" * 20)
        connection.putheader("Content-Type", "application/json")
        connection.endheaders()
        connection.sock.shutdown(socket.SHUT_WR) if connection.sock else None
        # Half-closed is closed for the server; it must simply live on.
        connection.close()
        connection = connect(url)
        connection.request("POST", "/v1/score", b"{}", {"Content-Length": "9" * 15})
        assert connection.sock is not None
        answer = connection.sock.recv(10_000)
        assert b" 413 " in answer.splitlines()[0]
        connection.close()
        assert score(url, item(noise(0))).ok


def test_slow_bodies_and_slow_headers_are_cut_off() -> None:
    with served(Toy(), read_seconds=0.3) as (url, _):
        host, port = urlsplit(url).netloc.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            slow.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
            assert b" 408 " in slow.recv(10_000).splitlines()[0]
        for start in (b"", b"GET /hea"):
            with socket.create_connection((host, int(port)), timeout=30) as slow:
                slow.sendall(start)
                assert slow.recv(10_000) == b""
        with socket.create_connection((host, int(port)), timeout=30) as reused:
            request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
            for _ in range(2):
                reused.sendall(request)
                received = b""
                while b'"ready"}' not in received:
                    received += reused.recv(10_000)
                assert received.startswith(b"HTTP/1.1 200 ")
            reused.sendall(b"GET /hea")
            assert reused.recv(10_000) == b""


def png(side: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"picture": {"codec": "png", "shape": [side, side, 3], "data": data}}


def test_small_files_that_unpack_to_a_lot_are_refused() -> None:
    with served(Toy(), max_body_bytes=2**22, max_pixels=10**6, max_items=200) as (url, _):
        refused(score(url, png(1001)), 413, "items.0.picture: A picture [1001, 1001, 3] has 1002001 pixels")
        assert score(url, png(1000)).ok
        # Each is within the limits; together they are not.
        refused(score(url, *[png(1000)] * 2), 413, "have 6000000 bytes when unpacked; at most 4194304")
        lying = png(900)
        lying["picture"]["shape"] = [2, 2, 3]
        refused(score(url, lying), 422, "900 x 900 pixels, but 2 x 2 RGB was announced")
        huge = {"picture": {"codec": "raw", "shape": [10**40, 10**40, 3], "data": ""}}
        refused(score(url, huge), 413, "when unpacked")


def test_limits_of_items_codecs_values_and_kinds() -> None:
    with served(Toy(), max_items=2) as (url, _):
        refused(score(url, *[item(noise(0))] * 3), 413, "3 pictures came; at most 2")
        jpeg = {"picture": pack(noise(0), "jpeg").model_dump()}
        refused(score(url, jpeg), 422, "'jpeg' is not taken here")
        video = item(noise(0, 2, 4, 4, 3))
        refused(score(url, video), 422, "a video came")
        body = b'{"reward":"toy","prompts":[' + b"{}," * 700_000 + b"{}]}"
        headers = {"Content-Type": "application/json"}
        refused(requests.post(url + "/v1/check", data=body, headers=headers, timeout=30), 413, "more than 1048576")
        refused(requests.post(url + "/v1/check", data=b"{}", timeout=30), 422, "Content-Type")
    with served(Toy(), allow_jpeg=True) as (url, _):
        assert score(url, jpeg).ok


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "body: Invalid JSON"),
        (b"[]", "body: Input should be an object"),
        (b'{"reward": "toy"}', "items: Field required"),
        (b'{"reward": "toy", "items": []}', "items: List should have at least 1 item"),
        (
            b'{"reward": "toy", "items": [{"picture": {"codec": "gif"}}]}',
            "items.0.picture.codec: Input should be 'raw'",
        ),
        (b'{"reward": "toy", "items": [7], "SECRET": 1}', "items.0: Input should be an object"),
        (b'{"reward": "toy", "items": ' + b"[" * 100_000, "recursion limit"),
        (b'{"reward": "toy", "items": ' + b'{"a":' * 100_000, "recursion limit"),
        (b'{"reward": ' + b"9" * 100_000, "number out of range"),
        (b'{"<secret field>": 1, "reward": "toy", "items": []}', "items"),
        (b"\xff\xfe", "Invalid JSON"),
    ],
)
def test_wrong_bodies_are_told_field_and_rule(shared: str, body: bytes, message: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = requests.post(shared + "/v1/score", data=body, headers=headers, timeout=30)
    refused(answer, 422, message)
    assert "secret" not in answer.text
    assert len(answer.text) < 600


@pytest.fixture(scope="module")
def shared() -> Any:
    with served(Toy()) as (url, _):
        yield url


def test_wrong_paths_and_methods(shared: str) -> None:
    refused(requests.get(shared + "/v1/nothing", timeout=30), 404, "nothing at this path")
    refused(requests.post(shared + "/v1/score/", timeout=30), 404, "nothing at this path")
    answer = requests.delete(shared + "/v1/score", timeout=30)
    refused(answer, 405, "method")
    assert answer.headers["Allow"] == "POST"
    for path in ("/docs", "/redoc"):
        refused(requests.get(shared + path, timeout=30), 404, "nothing")


def test_the_openapi_document_describes_every_message(shared: str) -> None:
    document = requests.get(shared + "/openapi.json", timeout=30).json()
    assert document["openapi"].startswith("3.")
    assert set(document["paths"]) == {"/v1/score", "/v1/check", "/v1/rewards", "/health", "/metrics"}
    schemas = document["components"]["schemas"]
    wanted = [part.partition('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]]
    assert set(wanted) <= set(schemas)
    assert {"ScoreRequest", "CheckRequest", "ScoreReply", "ErrorReply", "Picture"} <= set(schemas)
    assert "429" in document["paths"]["/v1/score"]["post"]["responses"]
    assert "HTTPValidationError" not in schemas


def test_a_full_queue_and_full_memory_are_429() -> None:
    toy = Toy()
    with served(toy, max_queue=2, max_items=2, max_body_bytes=10_000, max_memory_bytes=20_000) as (url, service):
        toy.go.clear()
        with ThreadPoolExecutor(4) as clients:
            first = clients.submit(score, url, item(noise(0), "first"))
            assert toy.begun.wait(20)
            waiting = clients.submit(score, url, item(noise(1)), item(noise(2)))
            until(lambda: b'queue_length{device="cpu"} 2.0' in service.metrics.render())
            answer = score(url, item(noise(3)))
            refused(answer, 429, "2 pictures are waiting")
            assert int(answer.headers["Retry-After"]) >= 1
            free = service.memory.free
            service.memory.take(free)
            refused(score(url, item(noise(3))), 429, "memory for requests is full")
            service.memory.give(free)
            toy.go.set()
            assert first.result().ok
            assert waiting.result().ok
        until(lambda: service.memory.free == 20_000)


def test_the_work_of_a_client_that_left_is_dropped() -> None:
    toy = Toy()
    with served(toy) as (url, service):
        toy.go.clear()
        with ThreadPoolExecutor(4) as clients:
            first = clients.submit(score, url, item(noise(0), "first"))
            assert toy.begun.wait(20)
            leaver = connect(url)
            body = json.dumps({"reward": "toy", "items": [item(noise(1), "leaver")]})
            leaver.request("POST", "/v1/score", body, {"Content-Type": "application/json"})
            until(lambda: b'queue_length{device="cpu"} 1.0' in service.metrics.render())
            leaver.close()
            until(lambda: b'requests_total{path="/v1/score",status="499"} 1.0' in service.metrics.render())
            toy.go.set()
            assert first.result().ok
            assert score(url, item(noise(2), "last")).ok
    assert toy.calls == [["first"], ["last"]]


def test_a_server_that_loads_or_ends_says_so() -> None:
    toy = Toy()
    toy.go.clear()
    with served(toy, wait=False) as (url, service):
        assert requests.get(url + "/health", timeout=30).json()["status"] == "loading"
        answer = score(url, item(noise(0)))
        refused(answer, 503, "loading")
        assert answer.headers["Retry-After"]
        toy.go.set()
        until(lambda: service.status == "ready")
        toy.go.clear()
        toy.begun.clear()
        with ThreadPoolExecutor(1) as clients:
            running = clients.submit(score, url, item(noise(0)))
            assert toy.begun.wait(20)
            service.end()
            assert requests.get(url + "/health", timeout=30).json()["status"] == "ending"
            refused(score(url, item(noise(0))), 503, "ending")
            toy.go.set()
            assert running.result().ok


def test_two_rewards_of_one_name_are_a_failure_to_load() -> None:
    with served(Toy(), Toy()) as (_, service):
        assert "Two rewards are called 'toy'" in str(service.failure)
