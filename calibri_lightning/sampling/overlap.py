"""Work that goes on behind the sampler: other threads score the pictures of units while the next unit is sampled.

Nothing is reordered: pieces of work are started in order and delivered in order, so many at a time as the rewards can
serve, and whatever one raises reaches the thread that handed it out. The other threads compute as the first would have
done: torch keeps autocast, inference mode, the current device and the current stream for each thread by itself, so they
are carried over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import torch

T = TypeVar("T")


class Behind:
    """Runs pieces of work in other threads, or at once, and delivers their results in order."""

    def __init__(self, device: torch.device, at_once: int = 1) -> None:
        """Starts nothing yet.

        Args:
            device: Where the tensors of the work are. On a GPU each piece gets a stream of its own, so that reading its
                results does not wait for what the sampler has queued meanwhile.
            at_once: Pieces that may be under way at the same time; 0 runs each in the calling thread.
        """
        on_gpu = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) if on_gpu else None for _ in range(at_once)]
        self._device, self._at_once, self._started = device, at_once, 0
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="calibri-scoring") if at_once else None
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        """Nothing to prepare."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Waits for the last pieces; their exception is raised unless another one is on its way already."""
        try:
            if kind is None:
                self.wait()
        finally:
            if self._pool is not None:
                # Finishes what is under way: a unit that was scored is then on record before the run ends.
                self._pool.shutdown(wait=True)

    def submit(self, work: Callable[[], T], deliver: Callable[[T], None]) -> None:
        """Waits until there is room, then starts the next piece.

        Args:
            work: The piece. It must have read its results from the device when it returns: only then may the memory of
                its tensors be used again.
            deliver: Takes its result; never called before that of the piece before, nor at the same time.

        Raises:
            BaseException: What an earlier piece raised; the next is not started then.
        """
        if self._pool is None:
            deliver(work())
            return
        while len(self._pending) >= self._at_once or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()
        # A stream is free again: the piece that had it last has been delivered.
        settings = _ThreadSettings.here(self._device, self._streams[self._started % self._at_once])
        before = self._pending[-1] if self._pending else None
        self._started += 1

        def run() -> None:
            with settings.applied():
                result = work()
                if before is not None:
                    before.result()
                deliver(result)

        self._pending.append(self._pool.submit(run))

    def wait(self) -> bool:
        """Waits for the pieces under way.

        Returns:
            Whether there were any.

        Raises:
            BaseException: What the first of them to fail raised.
        """
        pending, self._pending = self._pending, deque()
        for piece in pending:
            piece.result()
        return bool(pending)


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
