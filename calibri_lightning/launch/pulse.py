"""What this rank is doing: for whoever watches over the ranks, and for whoever asks the run to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

STARTING = "starting"
"""The stage before the first beat."""


class StopRequested(Exception):
    """Ends a run at a place from which it goes on exactly; raised on all ranks together.

    Args:
        number: The signal that asked for it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"asked to stop by {signal.Signals(number).name}")
        self.number = number


@dataclass(frozen=True)
class Reading:
    """What a rank is doing."""

    stage: str
    """In words, such as "drawing unit 3 of 8"."""
    count: int
    """Rises with every sign of progress."""
    waiting: bool
    """Whether the rank waits for the others, so that it is not the one that hangs."""


class Pulse:
    """Notes what the rank is doing; another thread reads it."""

    def __init__(self) -> None:
        # Loading, encoding and compiling take as long as they take, and say nothing meanwhile.
        self.reading = Reading(STARTING, 0, True)
        """Replaced as a whole, so that a reader in another thread never sees half of it."""
        self.stop = 0
        """The signal that asked the run to stop; 0 for none."""

    def beat(self, stage: str) -> None:
        """Says what is done next. Between two beats nothing is interrupted.

        Args:
            stage: In words.

        Raises:
            StopRequested: If the run was asked to stop.
        """
        self.note(stage)
        if self.stop:
            raise StopRequested(self.stop)

    def note(self, stage: str) -> None:
        """Says what is done next, where a stop would come at a bad moment.

        Args:
            stage: In words.
        """
        self.reading = Reading(stage, self.reading.count + 1, False)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Marks the time in which this rank waits for the others.

        Yields:
            Nothing.
        """
        before = self.reading
        self.reading = replace(before, count=before.count + 1, waiting=True)
        try:
            yield
        finally:
            self.reading = replace(before, count=before.count + 2)


class Stopwatch:
    """Tells how long something has been as it is.

    Args:
        now: The clock, seconds.
    """

    def __init__(self, now: float | None = None) -> None:
        self._value: object = None
        self._since = time.monotonic() if now is None else now

    def seconds(self, value: object, now: float | None = None) -> float:
        """Tells for how long the value has not changed.

        Args:
            value: The value now.
            now: The time now; that of the system's clock by default.

        Returns:
            Seconds; 0 where it has just changed.
        """
        now = time.monotonic() if now is None else now
        if value != self._value:
            self._value, self._since = value, now
        return now - self._since
