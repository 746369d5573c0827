"""Many clients against one reward server: latency, throughput, and whether any answer is lost or mixed up.

    python docs/reproduce/serve_load.py --seconds 60 --clients 32 --out load.json

Starts a server in a process of its own with a reward that costs next to nothing, so that what is measured is the
server: HTTP, JSON, unpacking, hashing, the queue and the batches. Every client sends one request after the other; each
has pictures that nobody has sent before, and every answer is compared with their hashes and scores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests
from numpy.typing import NDArray

from calibri_lightning.serving.pictures import pack
from calibri_lightning.serving.protocol import (
    Codec,
    Item,
    PromptText,
    RewardInfo,
    ScoreReply,
    ScoreRequest,
    content_hash,
)
from calibri_lightning.serving.run import script_main
from calibri_lightning.serving.scorer import Scorer


class Mean(Scorer):
    """The mean of a picture's bytes: a number that tells pictures apart."""

    def load(self) -> RewardInfo:
        """Loads nothing."""
        return RewardInfo(name="mean", model="mean", revision="1", preprocessing="none", pixels="uint8")

    def score(self, images: Sequence[NDArray[Any]], prompts: Sequence[PromptText]) -> Mapping[str, Sequence[float]]:
        """Takes the mean of each picture."""
        return {"mean": [mean(image) for image in images]}


def mean(image: NDArray[Any]) -> float:
    """What the server must answer."""
    return float(image.mean(dtype=np.float64))


@dataclass(frozen=True)
class Settings:
    """What the clients do."""

    seconds: float
    clients: int
    pictures: int
    side: int
    codec: Codec


@dataclass(frozen=True)
class Tally:
    """What one client saw."""

    seconds: list[float]
    wrong: int
    refused: dict[str, int]


def work(number: int, url: str, settings: Settings) -> Tally:
    """One client: sends requests until the time is over, and checks every answer."""
    rng, session = np.random.default_rng(number), requests.Session()
    times: list[float] = []
    refused: dict[str, int] = {}
    wrong, count, end = 0, 0, time.monotonic() + settings.seconds
    while time.monotonic() < end:
        shape = (settings.pictures, settings.side, settings.side, 3)
        images = list(rng.integers(0, 256, shape, dtype=np.uint8))
        prompts = [PromptText(text=f"client {number} request {count} picture {i}") for i in range(len(images))]
        items = [Item(picture=pack(i, settings.codec), prompt=p) for i, p in zip(images, prompts, strict=True)]
        body = ScoreRequest(reward="mean", items=items).model_dump_json()
        start = time.monotonic()
        answer = session.post(url + "/v1/score", body, headers={"Content-Type": "application/json"}, timeout=120)
        times.append(time.monotonic() - start)
        count += 1
        if answer.status_code != 200:
            refused[str(answer.status_code)] = refused.get(str(answer.status_code), 0) + 1
            continue
        results = ScoreReply.model_validate_json(answer.content).results
        wanted = [(mean(i), content_hash("mean", "1", i, p)) for i, p in zip(images, prompts, strict=True)]
        wrong += [(result.scores["mean"], result.hash) for result in results] != wanted
    return Tally(times, wrong, refused)


def client(number: int, url: str, settings: Settings, queue: Any) -> None:
    """Runs a client in a process and hands its tally back."""
    queue.put(work(number, url, settings))


def measure(settings: Settings) -> dict[str, Any]:
    """Starts a server and its clients; what they saw, together."""
    command = [sys.executable, __file__, "--serve", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = next(line for line in server.stdout if line.startswith("ready on ")).split()[2].rstrip(":")
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        clients = [context.Process(target=client, args=(n, url, settings, queue)) for n in range(settings.clients)]
        start = time.monotonic()
        for each in clients:
            each.start()
        tallies = [queue.get() for _ in clients]
        elapsed = time.monotonic() - start
        for each in clients:
            each.join()
        metrics = requests.get(url + "/metrics", timeout=30).text
        server.terminate()
        code = server.wait(60)
    finally:
        server.kill()
    times = np.array([seconds for tally in tallies for seconds in tally.seconds])
    refused: dict[str, int] = {}
    for tally in tallies:
        for status, number in tally.refused.items():
            refused[status] = refused.get(status, 0) + number
    return {
        **asdict(settings),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}",
        "requests": len(times),
        "refused": refused,
        "wrong": sum(tally.wrong for tally in tallies),
        "p50_ms": float(np.percentile(times, 50) * 1000),
        "p99_ms": float(np.percentile(times, 99) * 1000),
        "max_ms": float(times.max() * 1000),
        "requests_per_second": len(times) / elapsed,
        "pictures_per_second": len(times) * settings.pictures / elapsed,
        "mean_batch": number_of(metrics, "batch_size_sum") / max(number_of(metrics, "batch_size_count"), 1),
        "server_counted": number_of(metrics, "items_total"),
        "server_exit": code,
    }


def number_of(metrics: str, name: str) -> float:
    """Reads a number of the server's own."""
    lines = [line for line in metrics.splitlines() if line.startswith(f"calibri_reward_{name}{{")]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def processor() -> str:
    """The processor's name."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    """Measures, prints a table and writes JSON; 1 if an answer was wrong or missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the clients work")
    parser.add_argument("--clients", type=int, default=32, help="processes that send one request after the other")
    parser.add_argument("--pictures", type=int, default=4, help="pictures of a request")
    parser.add_argument("--side", type=int, default=64, help="pixels of a picture's side")
    parser.add_argument("--codec", default="raw", choices=["raw", "png", "webp-lossless"], help="how they are packed")
    parser.add_argument("--out", type=Path, help="write JSON")
    given = parser.parse_args()
    found = measure(Settings(given.seconds, given.clients, given.pictures, given.side, given.codec))
    for name, value in found.items():
        print(f"{name:<22}{f'{value:.1f}' if isinstance(value, float) else value}")
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    answered = (found["requests"] - sum(found["refused"].values())) * given.pictures
    return int(bool(found["wrong"]) or found["server_counted"] != answered or found["server_exit"] != 0)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        script_main(Mean, arguments=[word for word in sys.argv[1:] if word != "--serve"])
    sys.exit(main())
