"""What a reply must be before anything is done with it: each reader gives what it names, or raises `WireError`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibri_lightning.remote.errors import sanitised
from calibri_lightning.remote.wire import WireError

_MOST_BYTES = 4 << 20
_MOST = float(np.finfo(np.float32).max)
"""Scores become float32: what is larger would become infinite there."""


def read_json(body: bytes) -> object:
    """Reads a reply in JSON.

    Args:
        body: Anything.

    Returns:
        Its value.

    Raises:
        WireError: If it is no JSON, as which NaN and Infinity do not count, or too large.
    """
    if len(body) > _MOST_BYTES:
        raise WireError(f"the reply has {len(body)} bytes; scores need no more than {_MOST_BYTES}")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_number)
    # Deep nests are a RecursionError, bytes that are no UTF-8 a ValueError.
    except (ValueError, RecursionError) as error:
        raise WireError(f"the reply is no JSON ({type(error).__name__}: {str(error)[:100]})") from error


def mapping(value: object, what: str) -> Mapping[str, Any]:
    """Reads an object with keys.

    Args:
        value: Anything.
        what: Its name, for the message.

    Returns:
        The same.

    Raises:
        WireError: If it is something else.
    """
    if not isinstance(value, Mapping):
        raise WireError(f"{what} is {kind(value)}; the rule is an object with keys")
    return value


def entries(value: object, count: int, what: str) -> list[Any]:
    """Reads a list with one entry for each picture.

    Args:
        value: Anything.
        count: Number of pictures.
        what: Its name, for the message.

    Returns:
        The same.

    Raises:
        WireError: If it is something else, or of another length.
    """
    if not isinstance(value, list | tuple):
        raise WireError(f"{what} is {kind(value)}; the rule is a list with one entry for each picture")
    if len(value) != count:
        raise WireError(f"{what} has {len(value)} entries for {count} pictures")
    return list(value)


def number(value: object, what: str) -> float:
    """Reads a score.

    Args:
        value: Anything.
        what: Its name, for the message.

    Returns:
        The score; finite.

    Raises:
        WireError: If it is no finite number that float32 can hold; true and "1.0" are none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WireError(f"{what} is {kind(value)}; the rule is a number")
    # Compared as it is: an integer of a thousand digits has no float.
    if (isinstance(value, float) and not math.isfinite(value)) or abs(value) > _MOST:
        raise WireError(f"{what} is {value if isinstance(value, float) else 'an integer'}; the rule is a finite number")
    return float(value)


def numbers(value: object, count: int, what: str) -> NDArray[np.float64]:
    """Reads one score for each picture.

    Args:
        value: Anything.
        count: Number of pictures.
        what: Its name, for the message.

    Returns:
        float64 [B], finite.

    Raises:
        WireError: If it is something else.
    """
    found = entries(value, count, what)
    return np.array([number(entry, f"{what}[{index}]") for index, entry in enumerate(found)], dtype=np.float64)


def needed(found: Mapping[str, Any], key: str) -> Any:
    """Reads a key of a reply.

    Args:
        found: The reply.
        key: The key.

    Returns:
        Its value.

    Raises:
        WireError: If there is no such key; the message names those that are there.
    """
    if key not in found:
        there = ", ".join(str(name)[:40] for name in list(found)[:8]) or "none"
        raise WireError(f"the reply has no key {key!r}; it has {there}")
    return found[key]


def kind(value: object) -> str:
    """Names the type of a value, for a message.

    Args:
        value: Anything.

    Returns:
        Such as "a str" or "null".
    """
    return "null" if value is None else f"a {type(value).__name__}"


def told(value: object) -> str:
    """Quotes what a server said, for a message.

    Args:
        value: Anything that JSON or a plain pickle holds.

    Returns:
        One line of printable text; of what is no text, its type alone.
    """
    return sanitised(value) if isinstance(value, str) else kind(value)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")
