"""Reward servers for tests: toy rewards, a server in a thread, and, run as a script, one in a process."""

from __future__ import annotations

import argparse
import base64
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibri_lightning.serving.listening import open_socket, url_of
from calibri_lightning.serving.options import ServerOptions
from calibri_lightning.serving.protocol import PromptText, RewardInfo
from calibri_lightning.serving.run import RewardServer, configure, script_main
from calibri_lightning.serving.scorer import Scorer
from calibri_lightning.serving.service import RewardService

ROOT = Path(__file__).parents[1]


class Toy(Scorer):
    """Sums pixels and letters; prompts tell it to misbehave, and an event can hold it up."""

    def __init__(self, name: str = "toy", device: str = "cpu") -> None:
        self.name, self.device = name, device
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()
        self.calls: list[list[str]] = []
        self.threads: set[int] = set()

    def load(self) -> RewardInfo:
        self.threads.add(threading.get_ident())
        self.go.wait()
        return RewardInfo(name=self.name, model="toy", revision="1", preprocessing="none", extra_names=["letters"])

    def check(self, prompts: Sequence[PromptText]) -> str | None:
        self.threads.add(threading.get_ident())
        if any(prompt.text == "raise" for prompt in prompts):
            raise KeyError("check")
        return next((f"{prompt.text!r} is bad" for prompt in prompts if prompt.text.startswith("bad")), None)

    def score(self, images: Sequence[NDArray[Any]], prompts: Sequence[PromptText]) -> Mapping[str, Sequence[float]]:
        texts = [prompt.text for prompt in prompts]
        self.calls.append(texts)
        self.threads.add(threading.get_ident())
        self.begun.set()
        self.go.wait()
        assert len({(image.shape, image.dtype) for image in images}) == 1
        if "raise" in texts:
            raise ArithmeticError("no such picture")
        if "exit" in texts:
            raise SystemExit(3)
        scores = [float("nan") if text == "nan" else expected(image) for image, text in zip(images, texts, strict=True)]
        if "short" in texts:
            scores.pop()
        return {self.name: scores} if "nameless" in texts else {self.name: scores, "letters": list(map(len, texts))}


def expected(image: NDArray[Any]) -> float:
    """What the toy gives a picture."""
    return float(image.astype(np.float64).sum() / 7)


def item(pixels: NDArray[Any], text: str = "") -> dict[str, Any]:
    """A picture as raw bytes, in JSON's words."""
    data = base64.b64encode(pixels.tobytes()).decode()
    picture = {"codec": "raw", "dtype": str(pixels.dtype), "shape": list(pixels.shape), "data": data}
    return {"picture": picture, "prompt": {"text": text}}


def noise(seed: int, *shape: int) -> NDArray[np.uint8]:
    """A picture."""
    return np.random.default_rng(seed).integers(0, 256, shape or (4, 4, 3), dtype=np.uint8)


@contextmanager
def served(*scorers: Scorer, wait: bool = True, **options: Any) -> Iterator[tuple[str, RewardService]]:
    """A server in a thread, on a port of its own."""
    service = RewardService(scorers, ServerOptions(port=0, **options))
    with open_socket("127.0.0.1", 0) as listener:
        url = url_of(listener, "127.0.0.1", False)
        server = RewardServer(configure(service), service, lambda: None)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        try:
            until(lambda: server.started and (not wait or service.status == "ready" or service.failure is not None))
            yield url, service
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(condition: Any, seconds: float = 20.0) -> None:
    """Waits for something that must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@contextmanager
def process(
    *arguments: str, module: Sequence[str] = (__file__,), **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own; this file's toy unless another is named."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    running = subprocess.Popen(
        [sys.executable, *module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def ready(running: subprocess.Popen[str]) -> str:
    """Waits for a process to be ready; its URL."""
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("ready on "):
            return line.split()[2].rstrip(":")
    raise AssertionError(running.stderr.read() if running.stderr else "")


class SlowToy(Toy):
    """Takes a while to load and to score, or cannot be loaded."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__()
        self._given = given

    def load(self) -> RewardInfo:
        time.sleep(self._given.load_seconds)
        if self._given.broken:
            raise RuntimeError("these weights are broken")
        return super().load()

    def score(self, images: Sequence[NDArray[Any]], prompts: Sequence[PromptText]) -> Mapping[str, Sequence[float]]:
        time.sleep(self._given.score_seconds)
        return super().score(images, prompts)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this file as a script."""
    parser.add_argument("--load-seconds", type=float, default=0.0, help="before it is ready")
    parser.add_argument("--score-seconds", type=float, default=0.0, help="of each batch")
    parser.add_argument("--broken", action="store_true", help="cannot be loaded")


if __name__ == "__main__":
    script_main(SlowToy, add_options)
