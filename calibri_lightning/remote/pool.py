"""Several servers of one reward: who gets the next batch, who is left alone, and what is tried again.

A server that fails gets no more batches until it has answered a probe, and each failure in a row makes the pause
before the next probe longer: a time drawn from 0 up to twice the bound of the time before (exponential back-off with
full jitter). A failed batch goes to a server that is left; with none left, the pool waits for one. So back-off,
`Retry-After` and the search for a server that was restarted are one mechanism.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from numpy.typing import NDArray

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.remote.errors import POLICIES, ExchangeError, RemoteError
from calibri_lightning.remote.transport import CONNECT_TIMEOUT, Transport
from calibri_lightning.remote.urls import Address
from calibri_lightning.remote.wire import Batch, BatchScores, HttpRequest, NotReadyError, Wire, WireError

ATTEMPTS = 4
"""Most times that a batch is sent."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 15.0
_TICK = 0.2
"""Seconds between two looks at a server that another thread is probing."""
_UNREACHABLE = 5.0
"""Seconds that a server may be unreachable at the start: it may have been started a moment ago."""
_START_PAUSE = 1.0
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long servers are waited for, in seconds.

    Attributes:
        startup: For one that loads its model when the run starts.
        recovery: For any to come back when all have failed.
    """

    startup: float = 300.0
    recovery: float = 120.0


@dataclass
class _Server:
    address: Address
    outstanding: int = 0
    failures: int = 0
    """In a row."""
    out_until: float | None = None
    """When it may be probed; None while it gets batches."""
    last_error: str = ""
    probing: bool = False


@dataclass
class _Trail:
    """What has become of a batch."""

    barred: set[str] = field(default_factory=set)
    """Servers that must not see it again."""
    told: list[str] = field(default_factory=list)
    """Why each attempt failed."""


class Pool:
    """Servers of one reward; threads share it. Which of them scores makes no difference to a score."""

    def __init__(
        self,
        addresses: Sequence[Address],
        transport: Transport,
        wire: Wire,
        patience: Patience = Patience(),  # noqa: B008 - frozen
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        seed: int | None = None,
    ) -> None:
        """Asks nobody yet.

        Args:
            addresses: The servers; of those with equally little to do, the first gets a batch.
            transport: Speaks to them.
            wire: What is said.
            patience: How long they are waited for.
            clock: Tells the seconds.
            sleep: Waits.
            seed: Of the jitter; by default from the operating system, so that the clients of a server differ.
        """
        self._servers = [_Server(address) for address in addresses]
        self._transport, self._wire, self._patience = transport, wire, patience
        self._clock, self._sleep = clock, sleep
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._down_since: float | None = None

    def start(self) -> None:
        """Waits until every server is ready, and has them say what they serve.

        Raises:
            UserError: If one cannot be reached, does not get ready, or serves something else.
        """
        for server in self._servers:
            begun = self._clock()
            while (again_before := self._try_to_start(server)) is not None:
                waited = self._clock() - begun
                if waited >= again_before:
                    raise UserError(_unstarted(server, waited, again_before))
                self._sleep(_START_PAUSE)

    def reach(self) -> None:
        """Makes sure that somebody listens at every address.

        Raises:
            UserError: If nobody does, a few seconds long: a server may have been started a moment ago.
        """
        for server in self._servers:
            begun = self._clock()
            while True:
                try:
                    self._transport.connect(server.address)
                    break
                except ExchangeError as error:
                    server.last_error = str(error)
                    waited = self._clock() - begun
                    if waited >= _UNREACHABLE:
                        raise UserError(_unstarted(server, waited, _UNREACHABLE)) from error
                self._sleep(_START_PAUSE)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Asks one server whether it can score pictures of these prompts.

        Args:
            prompts: The prompts.

        Raises:
            UserError: If it refuses one.
            RemoteError: If none answers.
        """
        request = self._wire.check(prompts)
        if request is not None:
            self._ask(lambda _: request, lambda _, body: self._wire.accept_check(body))

    def score(self, pixels: NDArray[Any], prompts: Sequence[Prompt]) -> BatchScores:
        """Has a batch scored.

        Args:
            pixels: [B, H, W, 3] or videos [B, F, H, W, 3], of the wire's type.
            prompts: The prompt of each.

        Returns:
            The scores.

        Raises:
            RemoteError: If no server scores it.
            UserError: If the configuration is at fault.
        """
        batches = {far: Batch(pixels, prompts, far) for far in (False, True)}
        requests: dict[bool, HttpRequest] = {}

        def request(server: _Server) -> HttpRequest:
            far = not server.address.on_this_machine
            if far not in requests:
                requests[far] = self._wire.request(batches[far])
            return requests[far]

        return self._ask(
            request, lambda server, body: self._wire.parse(batches[not server.address.on_this_machine], body)
        )

    def _ask(self, request: Callable[[_Server], HttpRequest], accept: Callable[[_Server, bytes], _Result]) -> _Result:
        trail = _Trail()
        while True:
            server = self._take(trail)
            failure: ExchangeError | None = None
            try:
                return accept(server, self._transport.exchange(server.address, request(server)))
            except (ExchangeError, WireError) as error:
                failure = _failure(server, error)
                self._note(failure, trail, server)
                if POLICIES[failure.kind].repeat == "never" or len(trail.told) == ATTEMPTS:
                    raise RemoteError(_story(trail)) from error
            finally:
                self._give_back(server, failure)

    def _note(self, failure: ExchangeError, trail: _Trail, server: _Server) -> None:
        trail.told.append(str(failure))
        if POLICIES[failure.kind].repeat == "elsewhere":
            trail.barred.add(server.address.url)

    def _take(self, trail: _Trail) -> _Server:
        """The server with the least to do; waits for one if need be."""
        while True:
            due = self._due(trail)
            if due is not None:
                self._try_to_return(due)
            with self._lock:
                allowed = [s for s in self._servers if s.address.url not in trail.barred]
                free = [s for s in allowed if s.out_until is None]
                if free:
                    # The first of equals.
                    server = min(free, key=lambda s: s.outstanding)
                    server.outstanding += 1
                    return server
                pauses = [s.out_until for s in allowed if s.out_until is not None]
                waited = self._waited()
            if not pauses:
                raise RemoteError(_story(trail))
            left = self._patience.recovery - waited
            if left <= 0:
                raise RemoteError(self._all_down(waited))
            self._sleep(min(max(min(pauses) - self._clock(), _TICK), left))

    def _waited(self) -> float:
        """How long no server has been left, for whichever batch; the lock is held.

        Batches that come while all are away share one wait: each on its own would make a run take hours to end.
        """
        now = self._clock()
        if any(s.out_until is None for s in self._servers):
            self._down_since = None
            return 0.0
        if self._down_since is None:
            self._down_since = now
        return now - self._down_since

    def _due(self, trail: _Trail) -> _Server | None:
        """A server that is out and may be probed now, by this thread alone."""
        with self._lock:
            for server in self._servers:
                due = server.out_until is not None and server.out_until <= self._clock()
                if due and not server.probing and server.address.url not in trail.barred:
                    server.probing = True
                    return server
        return None

    def _try_to_return(self, server: _Server) -> None:
        try:
            self._probe(server)
        except (ExchangeError, WireError, UserError) as error:
            with self._lock:
                others = any(s.out_until is None for s in self._servers)
                self._evict(server, str(error), getattr(error, "retry_after", 0.0))
            # With others left, the run goes on without a server that serves something else now.
            if isinstance(error, UserError) and not others:
                raise UserError(f"The server {server.address.url} cannot be used any more: {error}") from error
        else:
            with self._lock:
                server.out_until = None
                self._down_since = None
            _log.info("The server %s is back.", server.address.url)
        finally:
            server.probing = False

    def _probe(self, server: _Server) -> None:
        """Asks whether it is ready, and whether it is still the same."""
        probe, roster = self._wire.probe(), self._wire.roster()
        if probe is None:
            self._transport.connect(server.address)
        else:
            self._wire.accept_probe(self._transport.exchange(server.address, probe, CONNECT_TIMEOUT))
        if roster is not None:
            self._wire.accept_roster(self._transport.exchange(server.address, roster, CONNECT_TIMEOUT))

    def _give_back(self, server: _Server, failure: ExchangeError | None) -> None:
        with self._lock:
            server.outstanding -= 1
            # A server that is out has been judged by another thread already.
            if server.out_until is not None:
                return
            if failure is None:
                server.failures = 0
            elif POLICIES[failure.kind].evicts:
                self._evict(server, str(failure), failure.retry_after)
                _log.warning("The server %s is left alone for a while: %s", server.address.url, failure)

    def _evict(self, server: _Server, why: str, retry_after: float) -> None:
        """Lets a server rest; the lock is held."""
        longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(server.failures, 10))
        server.failures += 1
        server.last_error = why
        server.out_until = self._clock() + max(retry_after, self._random.uniform(0, longest))

    def _all_down(self, waited: float) -> str:
        told = "; ".join(f"{s.address.url}: {s.last_error.rstrip('.') or 'refused this batch'}" for s in self._servers)
        return (
            f"No server of the reward came back within {waited:.0f} s. {told}. Start them again; a run that has ended "
            "goes on with --ckpt_path."
        )

    def _try_to_start(self, server: _Server) -> float | None:
        """Asks a server whether it is ready; seconds in all that may be waited, None if it is."""
        url = server.address.url
        try:
            self._probe(server)
        except NotReadyError as error:
            server.last_error = str(error)
        except ExchangeError as error:
            server.last_error = str(error)
            # Servers that score in the thread that answers are silent while they work for another client.
            if error.kind not in ("connection", "unavailable", "busy", "timeout"):
                raise UserError(f"The server {url} cannot be asked what it serves: {error}") from error
            if error.kind == "connection":
                return _UNREACHABLE
        except (WireError, UserError) as error:
            raise UserError(f"The server {url} cannot be used: {error}") from error
        else:
            return None
        _log.info("Waiting for the server %s: %s.", url, server.last_error)
        return self._patience.startup


def _failure(server: _Server, error: ExchangeError | WireError) -> ExchangeError:
    return error if isinstance(error, ExchangeError) else ExchangeError("garbage", f"{server.address.url}: {error}")


def _story(trail: _Trail) -> str:
    times = "once" if len(trail.told) == 1 else f"{len(trail.told)} times"
    return f"The batch was sent {times} and has no scores: {'; then '.join(dict.fromkeys(trail.told)).rstrip('.')}."


def _unstarted(server: _Server, waited: float, allowed: float) -> str:
    url, error = server.address.url, server.last_error
    if allowed == _UNREACHABLE:
        return (
            f"No server of rewards can be reached at {url}: {error}. Start one there, for example calibri_lightning "
            f"serve --reward pickscore --port {server.address.port}, or correct urls."
        )
    return (
        f"The server {url} was not ready after {waited:.0f} s: {error}. Wait until it has loaded its model, or raise "
        "startup_timeout."
    )
