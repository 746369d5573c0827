"""Servers that answer as the peers' own do, without their models: for tests of the wires."""

from __future__ import annotations

import base64
import io
import json
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
from PIL import Image

from calibri_lightning.prompts import Prompt
from calibri_lightning.remote.wire import Batch, HttpRequest

Answer = tuple[int, bytes]
Routes = Mapping[tuple[str, str], Callable[[bytes], Answer]]


class PlainUnpickler(pickle.Unpickler):
    """What a careful server would read requests with: an independent judge of what is sent."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def unpickled(body: bytes) -> Any:
    return PlainUnpickler(io.BytesIO(body)).load()


def file_pixels(data: bytes, kind: str) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=[kind]) as image:
        return np.array(image.convert("RGB"))


def brightness(pixels: np.ndarray) -> float:
    return float(pixels.mean())


def make_batch(count: int, metadata: Mapping[str, object] | None = None, size: int = 24) -> Batch:
    """Noise of different brightness, each with a prompt of different length."""
    generator = np.random.default_rng(0)
    pixels = np.stack([generator.integers(0, 60 + 50 * i, (size, size + 8, 3), dtype=np.uint8) for i in range(count)])
    texts = ["a red cube", "zwei Häuser {x}", "", "three  \u4e09 dogs"][:count]
    return Batch(pixels, [Prompt(text, index, metadata or {}) for index, text in enumerate(texts)])


@contextmanager
def serving(routes: Routes) -> Iterator[tuple[str, int]]:
    """Runs a server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            route = routes.get((self.command, self.path))
            status, reply = route(body) if route else (404, b"")
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield "127.0.0.1", server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(address: tuple[str, int], request: HttpRequest) -> Answer:
    connection = HTTPConnection(*address, timeout=20)
    try:
        connection.request(request.method, request.path, request.body, {"Content-Type": request.content_type})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def hpsv3(body: bytes) -> Answer:
    """Calibri's HPSv3 server: errors are pickled, too."""
    try:
        payload = unpickled(body)
        assert set(payload) == {"images", "prompts"}
        scores = [
            brightness(file_pixels(data, "jpeg")) + len(prompt)
            for data, prompt in zip(payload["images"], payload["prompts"], strict=True)
        ]
        return 200, pickle.dumps({"scores": scores})
    except Exception as error:
        return 500, pickle.dumps({"error": str(error)})


def qalign(body: bytes) -> Answer:
    """Calibri's Q-Align server; prompts may be there, but are not read."""
    payload = unpickled(body)
    assert payload.get("input", "image") == "image"
    sign = {"quality": 1, "aesthetics": -1}[payload.get("task", "quality")]
    return 200, pickle.dumps({"scores": [sign * brightness(file_pixels(data, "jpeg")) for data in payload["images"]]})


def deqa(body: bytes) -> Answer:
    """Flow-GRPO's DeQA server: errors are tracebacks."""
    try:
        return 200, pickle.dumps({"outputs": [brightness(file_pixels(d, "jpeg")) for d in unpickled(body)["images"]]})
    except Exception:
        return 500, traceback.format_exc().encode()


def geneval(body: bytes) -> Answer:
    """Flow-GRPO's GenEval server: lists, and dictionaries of groups in which -10 stands for another group."""
    payload = unpickled(body)
    scores, correct, strict = [], [], []
    tags = ["counting", "colors"]
    groups: dict[str, list[float]] = {tag: [] for tag in tags}
    for data, metadata in zip(payload["images"], payload["meta_datas"], strict=True):
        asked = sum(each["count"] for each in metadata["include"])
        scores.append(1 - brightness(file_pixels(data, "jpeg")) / asked + len(metadata["prompt"]))
        correct.append(0.0 if payload["only_strict"] else 1.0)
        strict.append(float(metadata["tag"] == "counting"))
        for tag in tags:
            groups[tag].append(1.0 if tag == metadata["tag"] else -10.0)
    reply = {"scores": scores, "rewards": correct, "strict_rewards": strict}
    return 200, pickle.dumps({**reply, "group_rewards": groups, "group_strict_rewards": groups})


def flow_factory(prompts: str, images: str) -> Routes:
    """A server after Flow-Factory's template."""

    def compute(body: bytes) -> Answer:
        data = json.loads(body)
        scores = [
            brightness(file_pixels(base64.b64decode(image), "png")) + len(prompt)
            for image, prompt in zip(data[images], data[prompts], strict=True)
        ]
        assert not any(data.get(key) for key in data if key not in (prompts, images))
        return 200, json.dumps({"rewards": scores}).encode()

    return {("POST", "/compute"): compute, ("GET", "/health"): lambda _: (200, b'{"status":"ok"}')}


def unirl(broken: int | None = None) -> Routes:
    """UniRL's gateway with one scorer of two sub-scores, which fails for one picture."""

    def score(body: bytes) -> Answer:
        asked = json.loads(body)["requests"]
        results: list[Any] = [{} for _ in asked]
        errors: list[Any] = [{} for _ in asked]
        for index, request in enumerate(asked):
            assert request["required_rewards"] == ["wise"]
            [turn] = request["history"]
            value = brightness(file_pixels(base64.b64decode(turn["image_b64"]), "png")) + len(turn["text"])
            value += (request["metadata"] or {}).get("bonus", 0)
            if index == broken:
                errors[index]["wise"] = "TimeoutError(\"reward 'wise' exceeded 120s\")"
            else:
                results[index]["wise"] = {"wiscore": value, "Aesthetic Quality": value / 2}
        identities = [{"request_id": request["request_id"], "sample_id": None} for request in asked]
        reply = {"results": results, "errors": errors, "identities": identities, "protocol_version": "1"}
        return 200, json.dumps(reply).encode()

    return {
        ("POST", "/score"): score,
        ("GET", "/health"): lambda _: (200, b'{"status":"ok","rewards":{"wise":["ok"]}}'),
        ("GET", "/rewards"): lambda _: (200, b'{"rewards":["clip","wise"]}'),
    }


def chat(tokens: Mapping[str, float] | list[tuple[str, float | None]], text: str = "Yes") -> dict[str, Any]:
    """A chat completion as vLLM answers it.

    Args:
        tokens: Likely first tokens and their probabilities, or pairs of tokens and log-probabilities.
        text: What was said.
    """
    pairs = [(t, float(np.log(p))) for t, p in tokens.items()] if isinstance(tokens, Mapping) else tokens
    top = [{"token": token, "logprob": logprob, "bytes": list(token.encode())} for token, logprob in pairs]
    content = [{**(top[0] if top else {}), "top_logprobs": top}]
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
    return {"object": "chat.completion", "choices": [{**choice, "logprobs": {"content": content}}]}


def judge(model: str = "Qwen/Qwen3-VL-8B-Instruct") -> Routes:
    """A chat server whose model says yes the more surely, the brighter a picture is."""

    def complete(body: bytes) -> Answer:
        asked = json.loads(body)
        assert asked["model"] == model
        assert (asked["temperature"], asked["seed"]) == (0.0, 0)
        [message] = asked["messages"]
        image, text = message["content"]
        head, _, data = image["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        value = brightness(file_pixels(base64.b64decode(data), "png")) / 255
        if "logprobs" not in asked:
            return 200, json.dumps(chat({}, f"{text['text']} Final Score: {1 + 4 * value:.6f}")).encode()
        assert (asked["logprobs"], asked["top_logprobs"], asked["max_tokens"]) == (True, 20, 1)
        return 200, json.dumps(chat({"Yes": 0.9 * value, "No": 0.9 * (1 - value), "It": 0.1})).encode()

    return {
        ("POST", "/v1/chat/completions"): complete,
        ("GET", "/v1/models"): lambda _: (200, json.dumps({"object": "list", "data": [{"id": model}]}).encode()),
        ("GET", "/health"): lambda _: (200, b""),
    }
