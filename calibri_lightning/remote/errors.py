"""How a request to a server can fail, and what may be done about each."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

FailureKind = Literal["connection", "unavailable", "busy", "timeout", "garbage", "failed", "refused"]
"""connection: none, or lost; unavailable: 502 to 504; busy: 429; timeout: no answer in time; garbage: an answer that
breaks the rules; failed: 500 and other 5xx; refused: other 4xx."""

_MOST_CHARACTERS = 300


@dataclass(frozen=True)
class Policy:
    """What a failure of one kind leads to.

    Attributes:
        repeat: Which servers may be sent the same batch again.
        evicts: Whether its server gets no more batches until it has answered a probe.
    """

    repeat: Literal["anywhere", "elsewhere", "never"]
    evicts: bool


POLICIES: Mapping[FailureKind, Policy] = {
    "connection": Policy("anywhere", evicts=True),
    "unavailable": Policy("anywhere", evicts=True),
    "busy": Policy("anywhere", evicts=True),
    # It is most likely still at work on the batch: the same batch again would wait behind itself.
    "timeout": Policy("elsewhere", evicts=True),
    "garbage": Policy("elsewhere", evicts=True),
    # The reward raised. If a picture did it, it would bring down one server after the other.
    "failed": Policy("never", evicts=True),
    # The request is at fault, not the server.
    "refused": Policy("never", evicts=False),
}
"""What follows from a failure."""


class RemoteError(RuntimeError):
    """A batch could not be scored by any server. No UserError: `on_failure: nan` may cover it."""


class ExchangeError(RemoteError):
    """One request to one server failed."""

    def __init__(self, kind: FailureKind, message: str, retry_after: float = 0.0) -> None:
        """Notes what happened.

        Args:
            kind: What kind of failure it is.
            message: What was sent, what came back, how to fix it.
            retry_after: Seconds that the server asks to be left alone.
        """
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


def sanitised(text: str, secrets: Collection[str] = ()) -> str:
    """Makes a text that came from outside fit for a message.

    Args:
        text: The text; anything at all.
        secrets: What must not be repeated.

    Returns:
        One line of at most 300 printable characters.
    """
    for secret in secrets:
        text = text.replace(secret, "***")
    # Only so much of it is looked at; ten times, as most of it may be blanks.
    head = text[: 10 * _MOST_CHARACTERS]
    printable = "".join(c if unicodedata.category(c)[0] not in "CZ" else " " for c in head)
    line = " ".join(printable.split())
    return line if len(line) <= _MOST_CHARACTERS else line[:_MOST_CHARACTERS] + "..."


def chain_of(error: BaseException) -> list[BaseException]:
    """Finds what lies below the classes of several HTTP libraries.

    Args:
        error: What `requests` or `urllib3` raised.

    Returns:
        It and all that it came from, the deepest last.
    """
    seen: list[BaseException] = []
    pending: list[object] = [error]
    while pending:
        found = pending.pop()
        if isinstance(found, BaseException) and found not in seen:
            seen.append(found)
            pending += [found.__context__, found.__cause__, getattr(found, "reason", None), *found.args]
    return seen


def cause_of(error: BaseException) -> str:
    """Says in a few words what went wrong.

    Args:
        error: What `requests` or `urllib3` raised.

    Returns:
        What the operating system calls it, such as "Connection refused", or else the deepest error.
    """
    chain = chain_of(error)
    system = [e for e in chain if isinstance(e, OSError) and isinstance(e.strerror, str)]
    if system:
        return sanitised(str(system[-1].strerror))
    return sanitised(f"{type(chain[-1]).__name__}: {chain[-1]}")
