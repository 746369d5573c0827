"""Watches over the ranks: one that hangs is named, with what it was doing, and all ranks end.

Collectives wait for a missing rank for half an hour or for ever, and say nothing of where it is. So each rank has a
thread that writes into a store what the rank is doing, and reads what the others wrote. A rank hangs if it has made no
progress for a while and does not wait for others, or if nothing at all is heard of it. Where all ranks wait, their
collectives do not fit together, which is said too.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from calibri_lightning.launch.pulse import STARTING, Pulse, Reading, Stopwatch
from calibri_lightning.ranks import print_once

if TYPE_CHECKING:
    from torch.distributed import Store

EXIT_CODE = 75
"""Of a rank that ends because of another one; "temporary failure" in sysexits.h: start it again."""
PATIENCE = 1200.0
"""Default of --rank_timeout, seconds: longer than a unit of pictures should take, and less than the 1800 s after which
torch ends a collective without a word of who was late."""
GRACE = 10.0
"""Seconds that a rank has to end by itself after another one has failed."""


@dataclass(frozen=True)
class Sign:
    """What a rank writes into the store."""

    reading: Reading
    """What it does."""
    ticks: int
    """Rises as long as its process lives."""
    where: str
    """Its machine and process."""


@dataclass(frozen=True)
class Failure:
    """What a rank says that fails before all others."""

    rank: int
    """That rank."""
    code: int
    """Its exit code, which the others take over: who looks at one of them alone knows what happened."""
    message: str
    """Why."""


class _Watched:
    """Another rank, as seen from here: its signs by the clock of this machine."""

    def __init__(self) -> None:
        self.sign: Sign | None = None
        self._life, self._progress = Stopwatch(), Stopwatch()
        self.quiet = self.still = 0.0

    def see(self, sign: Sign | None) -> None:
        self.sign = sign
        self.quiet = self._life.seconds(None if sign is None else sign.ticks)
        self.still = self._progress.seconds(None if sign is None else sign.reading)

    @property
    def waits(self) -> bool:
        return self.sign is not None and self.sign.reading.waiting

    @property
    def starts(self) -> bool:
        return self.sign is not None and self.sign.reading.stage == STARTING

    def describe(self, rank: int, patience: float) -> str:
        if self.sign is None:
            return f"Rank {rank} has not started"
        # Who lives gives a sign every few seconds.
        lives = "makes no progress; it is" if self.quiet < patience / 2 else "gives no sign of life, and was"
        return f"Rank {rank} ({self.sign.where}) {lives} {self.sign.reading.stage}"


class RankWatch(threading.Thread):
    """Watches over all ranks of a run from one of them.

    Args:
        store: Where the ranks tell each other; used by this thread alone.
        rank: This rank.
        world_size: Number of ranks.
        patience: Seconds without progress after which a rank counts as hung; 0 to report nothing.
        interval: Seconds between two looks; by default 2, and less where the patience is short.
        give_up: Called with message and exit code when ranks hang or one has failed; by default it prints the message
            and ends the process, which may be stuck where no exception reaches it.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        patience: float,
        interval: float | None = None,
        give_up: Callable[[str, int], None] | None = None,
    ) -> None:
        super().__init__(name="calibri-watch", daemon=True)
        self.patience, self.pulse = patience, Pulse()
        self._store, self._rank, self._interval, self._give_up = store, rank, interval, give_up or _end_process
        self._ranks = [_Watched() for _ in range(world_size)]
        self._over = threading.Event()
        self._failure, self._silence, self._ticks, self._code = Stopwatch(), Stopwatch(), 0, EXIT_CODE

    def run(self) -> None:
        """Looks, until the run is over."""
        while not self._over.is_set():
            try:
                problem = self._look()
                self._silence.seconds(self._ticks)
            except Exception:  # torch reports a store that is gone with one of several classes
                silent = self._silence.seconds("gone")
                problem = f"Rank 0, at which the ranks meet, has not answered for {silent:.0f} s. All ranks end."
                if silent < max(self.patience, GRACE):
                    problem = None
            if problem is not None and not self._over.is_set():
                with suppress(Exception):  # rank 0 may be gone
                    self._store.add("left", 1)
                self._give_up(problem, self._code)
                return
            self._over.wait(self._interval or min(2.0, (self.patience or PATIENCE) / 10))

    def stop(self) -> None:
        """Ends the watch."""
        self._over.set()

    def _look(self) -> str | None:
        """Tells the others, and reads what they do; says what is wrong, if something is."""
        self._ticks += 1
        sign = Sign(self.pulse.reading, self._ticks, f"{os.uname().nodename}, process {os.getpid()}")
        self._store.set(f"rank{self._rank}", json.dumps(asdict(sign)))
        failure = failed_rank(self._store)
        if failure is not None and failure.rank != self._rank:
            # What comes through a collective ends this rank by itself, and tidily.
            if self._failure.seconds(failure) < GRACE:
                return None
            self._code = failure.code
            return f"Rank {failure.rank} ended: {failure.message}"
        if not self.patience:
            return None
        for rank, watched in enumerate(self._ranks):
            watched.see(self._read(rank))
        for rank, watched in enumerate(self._ranks):
            seconds = max(watched.quiet, 0.0 if watched.waits else watched.still)
            if seconds > self.patience:
                return (
                    f"{watched.describe(rank, self.patience)}, for {seconds:.0f} s now. All ranks end; the last "
                    "checkpoint is intact. Look at that machine and at what the rank waits for (a reward server, a "
                    "disk, a GPU), and start again with --ckpt_path auto. If a step may take that long, raise "
                    "--rank_timeout."
                )
        least = min(0.0 if watched.starts else watched.still for watched in self._ranks)
        if least > self.patience:
            return (
                f"All ranks have waited for each other for {least:.0f} s: their collectives do not fit together, which "
                "is a defect of this program. Please report it with what was printed before."
            )
        return None

    def _read(self, rank: int) -> Sign | None:
        key = f"rank{rank}"
        if not self._store.check([key]):
            return None
        found: dict[str, Any] = json.loads(self._store.get(key))
        return Sign(Reading(**found["reading"]), found["ticks"], found["where"])


def failed_rank(store: Store) -> Failure | None:
    """Reads which rank has failed.

    Args:
        store: Where the ranks tell each other.

    Returns:
        What the first said that did; None where there is none.
    """
    if not store.check(["failed"]):
        return None
    rank, code, message = store.get("failed").decode().split(" ", 2)
    return Failure(int(rank), int(code), message)


def tell_failure(store: Store, failure: Failure) -> None:
    """Says that a rank has failed; what is known is the first failure, for others follow from it.

    Args:
        store: Where the ranks tell each other.
        failure: What happened.
    """
    if store.add("failures", 1) == 1:
        store.set("failed", f"{failure.rank} {failure.code} {failure.message}")


def _end_process(message: str, code: int) -> None:
    print_once(f"error: {message}")
    sys.stdout.flush()
    sys.stderr.flush()
    # The main thread may be stuck in a collective, where no exception reaches it.
    os._exit(code)
