"""Clients of `faulty_server` whose time passes only when they sleep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from faulty_server import FaultyServer
from numpy.typing import NDArray

from calibri_lightning.prompts import Prompt
from calibri_lightning.remote.native import NativeWire
from calibri_lightning.remote.pool import Patience, Pool
from calibri_lightning.remote.transport import Transport
from calibri_lightning.remote.urls import addresses

PROMPTS = tuple(Prompt("x" * i, i, {"numbers": (1, i)}) for i in range(4))
PIXELS: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
EXPECTED = [float(picture.mean(dtype=np.float64)) + i for i, picture in enumerate(PIXELS)]


@dataclass
class FakeTime:
    """A clock, and a sleep that moves it."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)
    on_sleep: Callable[[], object] = lambda: None

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        self.on_sleep()


def pool_of(
    *servers: FaultyServer,
    time: FakeTime | None = None,
    timeout: float = 20.0,
    patience: Patience = Patience(),  # noqa: B008
    token: str | None = None,
    max_reply_bytes: int = 2**20,
    started: bool = True,
) -> Pool:
    time = time or FakeTime()
    transport = Transport(timeout, token, max_reply_bytes=max_reply_bytes)
    places = addresses([server.url for server in servers])
    pool = Pool(places, transport, NativeWire("mean"), patience, time.clock, time.sleep, seed=0)
    if started:
        pool.start()
    return pool


def means(pool: Pool) -> list[float]:
    return pool.score(PIXELS, PROMPTS).scores["mean"].tolist()
