"""One queue and one thread a device: waiting pictures are put together to batches."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

from calibri_lightning.serving.metrics import Metrics
from calibri_lightning.serving.protocol import PromptText, RewardInfo
from calibri_lightning.serving.refusals import busy, shorten
from calibri_lightning.serving.scorer import Scorer

Row = dict[str, "float | None"]
"""The scores of one picture; None where it could not be scored."""
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class ScoringError(RuntimeError):
    """A reward raised or returned something other than its scores."""


@dataclass(frozen=True)
class Loaded:
    """A reward that can score.

    Attributes:
        info: What it is.
        scorer: What scores.
    """

    info: RewardInfo
    scorer: Scorer


@dataclass(frozen=True, eq=False)
class Job:
    """Pictures of one request, of one shape and type.

    Attributes:
        reward: What scores them.
        images: The pictures.
        prompts: The prompt of each.
        exact: Whether they are scored alone, all in one call.
        future: Their scores, or a `ScoringError`; cancelled, they are not scored unless that has begun.
        arrival: When they came, `time.monotonic`.
    """

    reward: Loaded
    images: Sequence[NDArray[Any]]
    prompts: Sequence[PromptText]
    exact: bool
    future: Future[list[Row]] = field(default_factory=Future)
    arrival: float = field(default_factory=time.monotonic)

    def joins(self, other: Job) -> bool:
        """Whether the pictures may be scored in one call.

        Args:
            other: A job that waits, too.

        Returns:
            True if neither wants to be alone, and reward, shape and type are the same.
        """
        mine, its = self.images[0], other.images[0]
        return (
            not self.exact
            and not other.exact
            and self.reward is other.reward
            and mine.shape == its.shape
            and mine.dtype == its.dtype
        )


@dataclass(frozen=True, eq=False)
class Call(Generic[_T]):
    """Something else that must run in the device's thread.

    Attributes:
        run: What runs.
        future: What it returns or raises.
    """

    run: Callable[[], _T]
    future: Future[_T] = field(default_factory=Future)


class DeviceQueue:
    """The queue of a device and the thread that works it off."""

    def __init__(
        self, device: str, max_batch: int, window_seconds: float, max_length: int, metrics: Metrics | None = None
    ) -> None:
        """Makes a queue; nothing runs before `start`.

        Args:
            device: Its name in metrics and logs.
            max_batch: Most pictures of a call of a reward, unless a job is exact.
            window_seconds: How long a call waits for more pictures.
            max_length: Most pictures that wait.
            metrics: What is counted.
        """
        self.device, self._max_batch, self._window, self._max_length = device, max_batch, window_seconds, max_length
        self._metrics = metrics or Metrics()
        self._waiting: deque[Job | Call[Any]] = deque()
        self._changed = threading.Condition()
        self._num_waiting = 0
        self._closed = False
        self._seconds_per_picture = 0.0
        self._thread = threading.Thread(target=self._work, name=f"scoring on {device}", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Adds the jobs of a request, all or none.

        Args:
            jobs: The jobs.

        Raises:
            Refusal: 429 if the queue is full, 503 if it is closed.
        """
        count = sum(len(job.images) for job in jobs)
        with self._changed:
            if self._closed:
                raise busy("The server is ending.", 1, 503)
            if self._num_waiting + count > self._max_length:
                seconds = min(max(math.ceil(self._num_waiting * self._seconds_per_picture), 1), 60)
                raise busy(f"{self._num_waiting} pictures are waiting; at most {self._max_length} do.", seconds)
            self._waiting.extend(jobs)
            self._count(count)
            self._changed.notify()

    def call(self, run: Callable[[], _T]) -> Future[_T]:
        """Runs something in the device's thread, after what waits already.

        Args:
            run: What.

        Returns:
            What it returns or raises.
        """
        call = Call(run)
        with self._changed:
            if self._closed:
                call.future.cancel()
            else:
                self._waiting.append(call)
                self._changed.notify()
        return call.future

    def close(self, timeout: float = 1.0) -> None:
        """Drops what waits and ends the thread once its present call returns.

        Args:
            timeout: How long to wait for that, seconds.
        """
        with self._changed:
            self._closed = True
            for work in self._waiting:
                work.future.cancel()
            self._changed.notify()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _count(self, change: int) -> None:
        self._num_waiting += change
        self._metrics.queue_length.labels(self.device).set(self._num_waiting)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                first = self._waiting.popleft()
                batch = [] if isinstance(first, Call) else self._gather(first)
            if isinstance(first, Call):
                _resolve(first)
            else:
                self._score_apart(batch)
            # A thread that waits for work would otherwise keep the last pictures alive.
            del first, batch

    def _gather(self, first: Job) -> list[Job]:
        """Takes out what can be scored together with a job, in order of arrival; the lock is held."""
        batch, room = [first], self._max_batch - len(first.images)
        deadline = first.arrival + self._window
        while not first.exact:
            for job in [work for work in self._waiting if isinstance(work, Job) and first.joins(work)]:
                if len(job.images) <= room:
                    self._waiting.remove(job)
                    batch.append(job)
                    room -= len(job.images)
            remaining = deadline - time.monotonic()
            # What waits now does not fit; it must not wait for pictures that might come.
            if room <= 0 or remaining <= 0 or self._waiting or self._closed:
                break
            self._changed.wait(remaining)
        self._count(-sum(len(job.images) for job in batch))
        return batch

    def _score_apart(self, batch: Sequence[Job]) -> None:
        """Scores jobs in one call, and each in its own if that fails: a bad picture fails its own request alone."""
        wanted = [job for job in batch if job.future.set_running_or_notify_cancel()]
        if not wanted:
            return
        rows = self._try(wanted)
        if isinstance(rows, ScoringError) and len(wanted) > 1:
            for job in wanted:
                self._hand_back([job], self._try([job]))
        else:
            self._hand_back(wanted, rows)

    def _try(self, jobs: Sequence[Job]) -> list[Row] | ScoringError:
        loaded, name = jobs[0].reward, jobs[0].reward.info.name
        images = [image for job in jobs for image in job.images]
        prompts = [prompt for job in jobs for prompt in job.prompts]
        start = time.monotonic()
        self._metrics.queue_seconds.labels(name).observe(start - jobs[0].arrival)
        self._metrics.batch_size.labels(name).observe(len(images))
        try:
            return score(loaded, images, prompts)
        except ScoringError as error:
            _log.error("%s", error)
            return error
        # A thread that dies would leave a server that answers nothing.
        except BaseException as error:
            _log.exception("The reward %r raised on %d pictures %s", name, len(images), list(images[0].shape))
            # A new exception: the old one's traceback would keep the pictures alive.
            return ScoringError(f"The reward {name!r} raised {type(error).__name__}: {shorten(str(error))}")
        finally:
            seconds = time.monotonic() - start
            self._metrics.scoring_seconds.labels(name).observe(seconds)
            recent = seconds / len(images)
            self._seconds_per_picture += 0.2 * (recent - self._seconds_per_picture)

    def _hand_back(self, jobs: Sequence[Job], rows: list[Row] | ScoringError) -> None:
        name, start = jobs[0].reward.info.name, 0
        for job in jobs:
            if isinstance(rows, ScoringError):
                self._metrics.failures.labels(name).inc(len(job.images))
                job.future.set_exception(rows)
            else:
                self._metrics.items.labels(name).inc(len(job.images))
                job.future.set_result(rows[start : start + len(job.images)])
                start += len(job.images)


def score(reward: Loaded, images: Sequence[NDArray[Any]], prompts: Sequence[PromptText]) -> list[Row]:
    """Calls a reward and checks what it returns.

    Args:
        reward: The reward.
        images: Pictures of one shape and type.
        prompts: The prompt of each.

    Returns:
        The scores of each picture; None where they are not finite.

    Raises:
        ScoringError: If it does not return one number a picture under each of its names.
    """
    names = (reward.info.name, *reward.info.extra_names)
    found = reward.scorer.score(images, prompts)
    columns: list[list[float]] = []
    for name in names:
        if name not in found:
            raise ScoringError(f"The reward {names[0]!r} returned no scores under {name!r}.")
        column = [float(value) for value in found[name]]
        if len(column) != len(images):
            raise ScoringError(
                f"The reward {names[0]!r} returned {len(column)} scores under {name!r} for {len(images)} pictures."
            )
        columns.append(column)
    return [
        {name: value if math.isfinite(value) else None for name, value in zip(names, row)}  # noqa: B905 - see columns
        for row in zip(*columns)  # noqa: B905 - all of one length
    ]


def _resolve(call: Call[Any]) -> None:
    if not call.future.set_running_or_notify_cancel():
        return
    try:
        call.future.set_result(call.run())
    except BaseException as error:
        call.future.set_exception(error)
