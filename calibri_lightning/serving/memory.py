"""Bytes that requests hold, counted, so that many of them cannot fill the memory."""

from __future__ import annotations

import threading

from calibri_lightning.serving.refusals import busy


class MemoryBudget:
    """Counts the bytes that requests hold, so that many of them cannot fill the memory."""

    def __init__(self, total: int) -> None:
        """Makes an unused budget.

        Args:
            total: Bytes.
        """
        self._free, self._lock = total, threading.Lock()

    @property
    def free(self) -> int:
        """Bytes that can be taken."""
        return self._free

    def take(self, count: int) -> None:
        """Takes bytes.

        Args:
            count: How many.

        Raises:
            Refusal: 429 if they are not free.
        """
        with self._lock:
            if count > self._free:
                raise busy("The memory for requests is full.", 1)
            self._free -= count

    def give(self, count: int) -> None:
        """Gives bytes back.

        Args:
            count: How many.
        """
        with self._lock:
            self._free += count


class MemoryLease:
    """What one request holds of a budget."""

    def __init__(self, budget: MemoryBudget) -> None:
        """Holds nothing yet.

        Args:
            budget: Where it takes from.
        """
        self._budget, self._held, self._over, self._lock = budget, 0, False, threading.Lock()

    def take(self, count: int) -> None:
        """Takes bytes.

        Args:
            count: How many.

        Raises:
            Refusal: 429 if they are not free; 503 if the request is over.
        """
        with self._lock:
            if self._over:
                raise busy("The request is over.", 1, 503)
            self._budget.take(count)
            self._held += count

    def release(self) -> None:
        """Gives everything back; nothing can be taken any more."""
        with self._lock:
            self._budget.give(self._held)
            self._held, self._over = 0, True
