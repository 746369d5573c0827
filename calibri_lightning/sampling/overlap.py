"""Work that goes on behind the sampler: one thread scores a unit's pictures while the next unit is sampled.

Nothing is reordered. One piece of work is under way at a time, the next one waits for it, and whatever it raises
reaches the thread that handed it out. The second thread computes as the first would have done: torch keeps autocast,
inference mode, the current device and the current stream for each thread by itself, so they are carried over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch


class Behind:
    """Runs pieces of work in order, one at a time, in a second thread or at once."""

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        """Starts nothing yet.

        Args:
            device: Where the tensors of the work are. On a GPU the work gets a stream of its own, so that reading its
                results does not wait for what the sampler has queued meanwhile.
            enabled: False runs each piece at once, in the calling thread.
        """
        self._stream = torch.cuda.Stream(device) if enabled and device.type == "cuda" else None
        self._device = device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="calibri-scoring") if enabled else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        """Nothing to prepare."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Waits for the last piece; its exception is raised unless another one is on its way already."""
        try:
            if kind is None:
                self.wait()
        finally:
            if self._pool is not None:
                # Finishes what is under way: a unit that was scored is then on record before the run ends.
                self._pool.shutdown(wait=True)

    def submit(self, work: Callable[[], None]) -> None:
        """Waits for the piece before, then starts the next.

        Args:
            work: The piece. It must have read its results from the device when it returns: only then may the memory of
                its tensors be used again.

        Raises:
            BaseException: What the piece before raised; the next is not started then.
        """
        if self._pool is None:
            work()
            return
        self.wait()
        settings = _ThreadSettings.here(self._device, self._stream)

        def run() -> None:
            with settings.applied():
                work()

        self._pending = self._pool.submit(run)

    def wait(self) -> bool:
        """Waits for the piece under way.

        Returns:
            Whether there was one.

        Raises:
            BaseException: What the piece raised.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return False
        pending.result()
        return True


@dataclass(frozen=True)
class _ThreadSettings:
    """What torch keeps for each thread."""

    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    """Device types on which autocast is on, and to what."""
    stream: torch.cuda.Stream | None
    ready: torch.cuda.Event | None
    """When the tensors that are handed over have been computed."""

    @classmethod
    def here(cls, device: torch.device, stream: torch.cuda.Stream | None) -> _ThreadSettings:
        """Reads the settings of the calling thread."""
        kinds = dict.fromkeys(("cpu", device.type))
        autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))
        ready = torch.cuda.current_stream(device).record_event() if stream is not None else None
        return cls(torch.is_inference_mode_enabled(), autocast, stream, ready)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts them into force."""
        with ExitStack() as stack:
            if self.inference:
                stack.enter_context(torch.inference_mode())
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            if self.stream is not None and self.ready is not None:
                stack.enter_context(torch.cuda.stream(self.stream))
                self.stream.wait_event(self.ready)
            yield
