"""How a kind of server is spoken to: which bytes go out for a batch, and what the bytes that come back mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from calibri_lightning.prompts import Prompt
from calibri_lightning.serving.protocol import PixelType, RewardInfo


class WireError(RuntimeError):
    """A reply is not what the wire's rules say; the batch has failed. No UserError: `on_failure: nan` may cover it."""


class NotReadyError(WireError):
    """A server is alive, but cannot score yet, or not any more."""


@dataclass(frozen=True)
class HttpRequest:
    """What is sent.

    Attributes:
        method: GET or POST.
        path: Added to the server's URL, for instance "/v1/score".
        body: The bytes.
        content_type: Their type.
    """

    method: Literal["GET", "POST"]
    path: str
    body: bytes = b""
    content_type: str = "application/json"


@dataclass(frozen=True)
class Batch:
    """Pictures to score.

    Attributes:
        pixels: [B, H, W, 3] or videos [B, F, H, W, 3]; of the wire's type (`Wire.pixels`).
        prompts: The prompt of each.
        crosses_hosts: Whether the server is on another machine, where smaller bodies are worth their packing.
    """

    pixels: NDArray[Any]
    prompts: Sequence[Prompt]
    crosses_hosts: bool = True


@dataclass(frozen=True)
class BatchScores:
    """What came back.

    Attributes:
        scores: float64 [B] under each name that the wire reports, the reward's own first; NaN where a picture failed.
        errors: Why, by place in the batch.
    """

    scores: Mapping[str, NDArray[np.float64]]
    errors: Mapping[int, str] = field(default_factory=dict)


class Wire(ABC):
    """One way to speak to a server about one reward. Holds no connection and no state of a call: threads share it."""

    name: str
    """Its name in configurations."""
    pixels: PixelType = "uint8"
    """What its batches hold; a wire may learn from the server's roster that it is float32."""
    extra_names: tuple[str, ...] = ()
    """Names of further scores that it reports; a wire may learn them from the roster, too."""
    takes_frames: bool = False
    """Whether it scores videos; others are given the middle frame."""
    max_items: int | None = None
    """Most pictures of one request; larger batches are cut. None if the wire knows no bound."""

    def describe(self) -> RewardInfo | None:
        """Says what scores, once the roster has been read; None if such servers do not say."""
        return None

    def most_items(self, batch: Batch) -> int:
        """Says how many of these pictures one request may hold; the answer must not depend on the server asked.

        Args:
            batch: The pictures.

        Returns:
            The number, from 1 up; larger batches are cut.

        Raises:
            UserError: If a picture is too large for a request of its own.
        """
        return min(len(batch.prompts), self.max_items or len(batch.prompts))

    def probe(self) -> HttpRequest | None:
        """What asks a server whether it is ready; None if such servers cannot be asked (a connection must do)."""
        return None

    def accept_probe(self, body: bytes) -> None:  # noqa: B027 - such servers may not answer
        """Reads the answer to the probe.

        Args:
            body: The answer, status 200.

        Raises:
            NotReadyError: If the server is not ready: it is asked again.
            UserError: If it is a server of another kind.
            WireError: If the answer cannot be read.
        """

    def roster(self) -> HttpRequest | None:
        """What asks a server, once at the start, what it serves; None if such servers do not say."""
        return None

    def accept_roster(self, body: bytes) -> None:  # noqa: B027 - such servers may not answer
        """Reads what a server serves.

        Args:
            body: The answer, status 200.

        Raises:
            UserError: If it does not serve this reward, or another revision than the servers before it.
            WireError: If the answer cannot be read.
        """

    def check(self, prompts: Sequence[Prompt]) -> HttpRequest | None:
        """What asks a server whether it can score pictures of these prompts.

        Args:
            prompts: The prompts.

        Returns:
            The request; None if such servers cannot be asked.

        Raises:
            UserError: If the wire sees by itself that a prompt cannot be scored.
        """
        return None

    def accept_check(self, body: bytes) -> None:  # noqa: B027 - such servers may not answer
        """Reads the answer to `check`.

        Args:
            body: The answer, status 200.

        Raises:
            UserError: If the server refuses a prompt.
            WireError: If the answer cannot be read.
        """

    @abstractmethod
    def request(self, batch: Batch) -> HttpRequest:
        """What asks a server for the scores of a batch.

        Args:
            batch: The pictures.

        Returns:
            The request.
        """

    @abstractmethod
    def parse(self, batch: Batch, body: bytes) -> BatchScores:
        """Reads the scores.

        Args:
            batch: The pictures that were sent.
            body: The answer, status 200; anything at all.

        Returns:
            The scores; one for each picture, in their order.

        Raises:
            WireError: If the answer is not what the rules say: damaged, of another length, mixed up.
        """
