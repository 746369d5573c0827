"""A reward that servers compute."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.remote.errors import RemoteError
from calibri_lightning.remote.pool import Patience, Pool
from calibri_lightning.remote.transport import Transport
from calibri_lightning.remote.urls import TokenSource, addresses
from calibri_lightning.remote.wire import Batch, BatchScores, Wire
from calibri_lightning.remote.wires import make_wire
from calibri_lightning.rewards.base import ModelInfo, Reward
from calibri_lightning.rewards.pixels import to_pixels
from calibri_lightning.serving.protocol import PixelType

_CHECKED_AT_ONCE = 200
"""Prompts of one request, so that it stays below what servers take."""
_MOST_MESSAGES = 20
"""Different errors of single pictures that are told; more are only counted."""
_log = logging.getLogger(__name__)


class RemoteReward(Reward):
    """Has pictures scored by one server or several that offer the same model.

    Servers are asked for the first time when a run checks its prompts: whether they are ready, and what they serve.
    """

    name = "remote"

    def __init__(
        self,
        urls: str | Sequence[str],
        reward: str | None = None,
        wire: str = "calibri-lightning",
        extra_names: Sequence[str] = (),
        token_env: str | None = None,
        token_file: str | None = None,
        ca_file: str | None = None,
        timeout: float = 120.0,
        startup_timeout: float = 300.0,
        recovery_timeout: float = 120.0,
        per_server: int = 1,
        **wire_options: Any,
    ) -> None:
        """Contacts nobody yet.

        Args:
            urls: URL of the server, or a list of URLs.
            reward: Name of the reward on the servers; by default its name in this run.
            wire: How the servers are spoken to: a name in `calibri_lightning.remote.wires.WIRES`, or the import path of
                a `Wire`.
            extra_names: Further scores of the servers that are reported, too.
            token_env: Name of an environment variable that holds the bearer token.
            token_file: Path of a file that holds it.
            ca_file: Certificates to trust, for https with a certificate of one's own.
            timeout: Seconds until the scores of a batch must begin to come.
            startup_timeout: Seconds to wait for a server that loads its model when the run starts.
            recovery_timeout: Seconds to wait during the run when no server is left.
            per_server: Batches that a server is sent at the same time.
            **wire_options: Options of the wire, for instance codec.

        Raises:
            UserError: If an option is none.
        """
        self._addresses = addresses(urls)
        if isinstance(per_server, bool) or not isinstance(per_server, int) or per_server < 1:
            raise UserError(f"per_server is {per_server!r}; it is a number of batches, from 1 up.")
        for what, value in (("timeout", timeout), ("startup_timeout", startup_timeout)):
            _check_seconds(what, value, above=0)
        _check_seconds("recovery_timeout", recovery_timeout)
        if isinstance(extra_names, str) or not all(isinstance(name, str) for name in extra_names):
            raise UserError(f"extra_names is {extra_names!r}; it is a list of names, for example [alignment].")
        self.extra_names, self.concurrency = tuple(extra_names), per_server * len(self._addresses)
        self._reward, self._wire_name, self._wire_options = reward, wire, wire_options
        self._token, self._ca_file, self._timeout = TokenSource(token_env, token_file), ca_file, float(timeout)
        self._patience = Patience(float(startup_timeout), float(recovery_timeout))
        self._lock = threading.Lock()
        self._failures: Counter[str] = Counter()
        self._connection: tuple[Pool, Wire] | None = None
        self._threads: ThreadPoolExecutor | None = None
        # Refuses wrong options now, not after a model was loaded; the name it will go by may still be unknown.
        self._make_wire()

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Makes sure that somebody listens at every URL; what is served there is asked later.

        Args:
            options: Arguments of the class.

        Raises:
            UserError: If an option is none, or a server cannot be reached.
        """
        made = cls(**options)
        made._make_pool(made._make_wire()).reach()

    @property
    def failures(self) -> Counter[str]:
        """How many pictures could not be scored, by what the servers said of them."""
        with self._lock:
            return Counter(self._failures)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Waits for the servers, compares what they serve, and has one of them look at the prompts.

        Args:
            prompts: The prompts.

        Raises:
            UserError: If a server cannot be used, or refuses a prompt.
        """
        pool, _ = self._connected()
        try:
            for start in range(0, len(prompts), _CHECKED_AT_ONCE):
                pool.check(prompts[start : start + _CHECKED_AT_ONCE])
        except RemoteError as error:
            raise UserError(f"The prompts could not be checked by the servers of {self.name!r}: {error}") from error

    def describe(self) -> ModelInfo:
        """Says what gives the scores; asks the servers if they have not been asked.

        Returns:
            What the servers say; for those that do not, their kind and their addresses.

        Raises:
            UserError: If a server cannot be used.
        """
        _, wire = self._connected()
        info = wire.describe()
        if info is not None:
            return ModelInfo(info.model, info.revision, info.preprocessing)
        places = ", ".join(address.url for address in self._addresses)
        return ModelInfo(f"{self._wire_name} at {places}", "unknown", "unknown")

    def recipe(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Says what scores, not where it does: a run may go on with other servers of the same model.

        Args:
            options: The arguments with which it was made.

        Returns:
            The wire and its options; once servers were asked, model, revision and preprocessing, if they say.
        """
        connected = self._connection
        info = connected[1].describe() if connected is not None else None
        served = {} if info is None else {key: getattr(info, key) for key in ("model", "revision", "preprocessing")}
        return {"reward": self._reward or self.name, "wire": self._wire_name, **self._wire_options, **served}

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores pictures.

        Args:
            images: float32 [B, 3, H, W] in 0..1, or videos [B, F, 3, H, W] if the servers score videos.
            prompts: The prompt of each.

        Returns:
            float32 [B]; NaN where a picture could not be scored.

        Raises:
            RemoteError: If no server scores them.
            UserError: If the configuration is at fault.
        """
        return self.measure(images, prompts)[self.name]

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """Scores pictures, with the extra scores; several threads may call it at once.

        Args:
            images: float32 [B, 3, H, W] in 0..1, or videos [B, F, 3, H, W] if the servers score videos.
            prompts: The prompt of each.

        Returns:
            float32 [B] under the reward's name and each of `extra_names`; NaN where a picture could not be scored.

        Raises:
            RemoteError: If no server scores them.
            UserError: If the configuration is at fault.
        """
        pool, wire = self._connected()
        if not len(images):
            return {name: images.new_zeros(0) for name in (self.name, *self.extra_names)}
        pixels = _pixels(images, wire.pixels)
        most = wire.most_items(Batch(pixels, prompts))
        places = [slice(start, start + most) for start in range(0, len(prompts), most)]
        parts = self._together([partial(pool.score, pixels[place], prompts[place]) for place in places])
        for part in parts:
            self._tell(part)
        own = next(iter(parts[0].scores))
        names = {self.name: own, **{name: name for name in self.extra_names}}
        joined = {name: np.concatenate([part.scores[theirs] for part in parts]) for name, theirs in names.items()}
        return {name: torch.from_numpy(values).to(images.device, torch.float32) for name, values in joined.items()}

    def _together(self, requests: Sequence[Callable[[], BatchScores]]) -> list[BatchScores]:
        """Sends the requests of a batch, as many at a time as the servers take; the answers in their order."""
        if len(requests) == 1 or self.concurrency == 1:
            return [request() for request in requests]
        with self._lock:
            if self._threads is None:
                # Shared by all batches, so that many at once send no more than one.
                self._threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="calibri-remote")
        sent = [self._threads.submit(request) for request in requests]
        try:
            return [answer.result() for answer in sent]
        finally:
            for answer in sent:
                answer.cancel()

    def _connected(self) -> tuple[Pool, Wire]:
        """The servers, once all have said what they serve."""
        with self._lock:
            if self._connection is None:
                # Only now: the name by which a run knows a reward is given to it after it was made.
                wire = self._make_wire()
                pool = self._make_pool(wire)
                pool.start()
                self._refuse_extra_names(wire)
                self.pixels, self.takes_frames = wire.pixels, wire.takes_frames
                info = wire.describe()
                if info is not None:
                    _log.info("%s is scored by %s, revision %s.", self.name, info.model, info.revision)
                self._connection = pool, wire
            return self._connection

    def _make_wire(self) -> Wire:
        return make_wire(self._wire_name, self._reward or self.name, self._wire_options)

    def _make_pool(self, wire: Wire) -> Pool:
        return Pool(self._addresses, self._make_transport(), wire, self._patience)

    def _make_transport(self) -> Transport:
        token = self._token.read()
        for address in self._addresses:
            if token is not None and not address.encrypted and not address.on_this_machine:
                _log.warning(
                    "The token for %s goes over the network in the clear, as do the pictures; use https, or a tunnel "
                    "(ssh -L), where others listen.",
                    address.url,
                )
        return Transport(self._timeout, token, self._ca_file)

    def _refuse_extra_names(self, wire: Wire) -> None:
        unknown = [name for name in self.extra_names if name not in wire.extra_names]
        if unknown:
            raise UserError(
                f"extra_names of the reward {self.name!r} has {unknown[0]!r}; its servers have "
                f"{', '.join(wire.extra_names) or 'none'}. Correct or remove it."
            )

    def _tell(self, scores: BatchScores) -> None:
        """Says each error of single pictures once, and counts it."""
        for message in scores.errors.values():
            with self._lock:
                known = message in self._failures
                key = message if known or len(self._failures) < _MOST_MESSAGES else "others"
                first = key not in self._failures
                self._failures[key] += 1
            if first:
                _log.warning("%s could not score a picture: %s. Its score is NaN; told once.", self.name, message)


def _pixels(images: Tensor, kind: PixelType) -> NDArray[Any]:
    """Pictures [B, H, W, 3], or videos [B, F, H, W, 3], as they are sent."""
    if kind == "float32":
        exact: NDArray[Any] = images.to(torch.float32).movedim(-3, -1).contiguous().cpu().numpy()
        return exact
    rounded = to_pixels(images.reshape(-1, *images.shape[-3:]))
    return rounded.reshape(*images.shape[:-3], *rounded.shape[1:])


def _check_seconds(what: str, value: object, above: float | None = None) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or value == above:  # type: ignore[operator]
        rule = "0 or more" if above is None else "more than 0"
        raise UserError(f"{what} is {value!r}; it is a number of seconds, {rule}.")
