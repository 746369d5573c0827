"""How a request to a server can fail, and what may be done about each."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection

_MOST_CHARACTERS = 300


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
