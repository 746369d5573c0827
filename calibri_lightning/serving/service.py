"""The rewards of a server, from messages to scores; knows nothing of HTTP but its statuses."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from numpy.typing import NDArray

from calibri_lightning.errors import UserError
from calibri_lightning.serving.batching import DeviceQueue, Job, Loaded
from calibri_lightning.serving.memory import MemoryBudget, MemoryLease
from calibri_lightning.serving.metrics import Metrics
from calibri_lightning.serving.options import ServerOptions
from calibri_lightning.serving.parsing import parse
from calibri_lightning.serving.pictures import TooLargeError, unpack
from calibri_lightning.serving.protocol import (
    CheckRequest,
    Result,
    RewardInfo,
    Roster,
    ScoreReply,
    ScoreRequest,
    content_hash,
)
from calibri_lightning.serving.refusals import Refusal, shorten
from calibri_lightning.serving.scorer import Scorer

_log = logging.getLogger(__name__)
_READERS = 4
"""Threads that unpack pictures; more would take turns at Python's lock."""


@dataclass(frozen=True)
class _Served:
    """A reward and the queue of its device."""

    loaded: Loaded
    queue: DeviceQueue


@dataclass(frozen=True)
class Prepared:
    """A request that has been read.

    Attributes:
        info: What scores it.
        jobs: Its pictures, grouped by shape and type.
        places: Where the pictures of each job stood in the request.
        hashes: `content_hash` of each picture.
    """

    info: RewardInfo
    jobs: Sequence[Job]
    places: Sequence[Sequence[int]]
    hashes: Sequence[str]

    def reply(self) -> ScoreReply:
        """Puts scores in the order of the request.

        Returns:
            The reply.

        Raises:
            ScoringError: If the reward raised.
        """
        results: dict[int, Result] = {}
        for job, places in zip(self.jobs, self.places):  # noqa: B905 - made together
            for place, row in zip(places, job.future.result()):  # noqa: B905 - as many as pictures
                error = "the reward could not score it" if row[self.info.name] is None else None
                results[place] = Result(scores=row, error=error, hash=self.hashes[place])
        return ScoreReply(reward=self.info, results=[results[place] for place in range(len(self.hashes))])


class RewardService:
    """Loads rewards and scores with them.

    Attributes:
        options: Its settings.
        metrics: What it counts.
        memory: What requests hold.
        failure: Why a reward could not be loaded; the server must end.
        num_running: Requests in progress.
    """

    def __init__(self, scorers: Sequence[Scorer], options: ServerOptions | None = None) -> None:
        """Loads nothing yet.

        Args:
            scorers: The rewards; those of one device share a thread.
            options: Settings.

        Raises:
            UserError: If there is no reward.
        """
        if not scorers:
            raise UserError("A server needs a reward, and has none. Name one.")
        self.options, self.metrics = options or ServerOptions(), Metrics()
        self.memory = MemoryBudget(self.options.max_memory_bytes)
        self.failure: Exception | None = None
        self.num_running = 0
        self._ending = False
        self._scorers = tuple(scorers)
        self._served: dict[str, _Served] = {}
        self._lock = threading.Lock()
        self._num_loading = len(self._scorers)
        window = self.options.batch_window_ms / 1000
        self._queues = {
            device: DeviceQueue(device, self.options.max_batch, window, self.options.max_queue, self.metrics)
            for device in dict.fromkeys(scorer.device for scorer in self._scorers)
        }
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reading")

    @property
    def status(self) -> Literal["loading", "ready", "ending"]:
        """Whether it can score."""
        return "ending" if self._ending else "loading" if self._num_loading else "ready"

    @property
    def infos(self) -> list[RewardInfo]:
        """Its rewards, as they were given; those that are loaded."""
        found = {id(served.loaded.scorer): served.loaded.info for served in self._served.values()}
        return [found[id(scorer)] for scorer in self._scorers if id(scorer) in found]

    def start(self) -> None:
        """Begins to load all rewards, each in the thread of its device."""
        for queue in self._queues.values():
            queue.start()
        for scorer in self._scorers:
            queue = self._queues[scorer.device]
            queue.call(lambda scorer=scorer, queue=queue: self._load(scorer, queue))  # type: ignore[misc]

    def _load(self, scorer: Scorer, queue: DeviceQueue) -> None:
        if self.failure is not None:
            return
        try:
            info = RewardInfo.model_validate(scorer.load())
            with self._lock:
                if info.name in self._served:
                    raise UserError(f"Two rewards are called {info.name!r}. Names must differ: leave one out.")
                self._served[info.name] = _Served(Loaded(info, scorer), queue)
                self._num_loading -= 1
        # Libraries of models raise anything, SystemExit included; the main thread ends the server.
        except BaseException as error:
            if not isinstance(error, UserError):
                _log.exception("A reward could not be loaded")
            self.failure = error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")

    def end(self) -> None:
        """Refuses new requests from now on; running ones go on."""
        self._ending = True

    def close(self) -> None:
        """Drops what waits and ends all threads."""
        self.end()
        for queue in self._queues.values():
            queue.close()
        self._readers.shutdown(wait=False)

    def roster(self) -> Roster:
        """What it offers."""
        return Roster(rewards=self.infos, limits=self.options.limits)

    def read_score(self, body: bytes, lease: MemoryLease) -> Future[Prepared]:
        """Reads a request to score, in another thread.

        Args:
            body: JSON.
            lease: What the request holds.

        Returns:
            The request; or a `Refusal`.
        """
        return self._readers.submit(self._read, body, lease)

    def read_check(self, body: bytes) -> Future[CheckRequest]:
        """Reads a request to check prompts, in another thread.

        Args:
            body: JSON.

        Returns:
            The request; or a `Refusal`.
        """
        return self._readers.submit(parse, CheckRequest, body)

    def check(self, request: CheckRequest) -> Future[str | None]:
        """Asks a reward about prompts.

        Args:
            request: The request.

        Returns:
            What is wrong with them; or whatever the reward raised.

        Raises:
            Refusal: If there is no such reward.
        """
        served = self._find(request.reward)
        return served.queue.call(lambda: served.loaded.scorer.check(request.prompts))

    def submit(self, prepared: Prepared) -> None:
        """Queues a request.

        Args:
            prepared: The request.

        Raises:
            Refusal: If the queue is full.
        """
        self._find(prepared.info.name).queue.submit(prepared.jobs)

    def _find(self, name: str) -> _Served:
        if name not in self._served:
            raise Refusal(404, f"There is no such reward here; there are {', '.join(self._served)}.")
        return self._served[name]

    def _read(self, body: bytes, lease: MemoryLease) -> Prepared:
        request = parse(ScoreRequest, body)
        served = self._find(request.reward)
        info = served.loaded.info
        if len(request.items) > self.options.max_items:
            raise Refusal(
                413, f"{len(request.items)} pictures came; at most {self.options.max_items} are taken at once."
            )
        lease.take(self._size(request))
        images = [self._unpack(place, request, info) for place in range(len(request.items))]
        prompts = [item.prompt for item in request.items]
        hashes = [
            content_hash(info.name, info.revision, image, prompt)
            for image, prompt in zip(images, prompts)  # noqa: B905 - both have one of each item
        ]
        places = self._group(images, request.exact)
        jobs = [
            Job(served.loaded, [images[i] for i in group], [prompts[i] for i in group], request.exact)
            for group in places
        ]
        return Prepared(info, jobs, places, hashes)

    def _size(self, request: ScoreRequest) -> int:
        """Bytes of the unpacked pictures. Small files can unpack to a lot: each within the limit, all far beyond."""
        total = sum(prod(i.picture.shape) * (4 if i.picture.dtype == "float32" else 1) for i in request.items)
        if total > self.options.max_body_bytes:
            raise Refusal(
                413,
                f"The pictures have {shorten(str(total))} bytes when unpacked; at most {self.options.max_body_bytes} "
                "are taken at once.",
            )
        return total

    def _unpack(self, place: int, request: ScoreRequest, info: RewardInfo) -> NDArray[Any]:
        picture = request.items[place].picture
        try:
            if len(picture.shape) == 4 and not info.takes_frames:
                raise UserError(f"The reward {info.name!r} scores pictures [H, W, 3], and a video came.")
            return unpack(picture, self.options.max_pixels, self.options.codecs)
        except UserError as error:
            status = 413 if isinstance(error, TooLargeError) else 422
            raise Refusal(status, f"items.{place}.picture: {error}") from error

    def _group(self, images: Sequence[NDArray[Any]], exact: bool) -> list[list[int]]:
        """Places of pictures that can be scored in one call."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, image in enumerate(images):
            groups.setdefault((image.shape, str(image.dtype)), []).append(place)
        if exact:
            if len(groups) > 1:
                raise Refusal(422, "exact: pictures of several shapes or types cannot be one batch.")
            return list(groups.values())
        most = self.options.max_batch
        return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]
