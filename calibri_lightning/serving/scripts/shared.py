"""What the scripts share: pictures as Pillow's, batches, and options of the command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def to_pillow(images: Sequence[NDArray[Any]]) -> list[Image.Image]:
    """Rounds pictures to 8 bits, as a file would.

    Args:
        images: uint8, or float32 in 0..1, [H, W, 3].

    Returns:
        RGB pictures.
    """
    rounded = (image if image.dtype == np.uint8 else np.clip(np.rint(image * 255), 0, 255) for image in images)
    return [Image.fromarray(image.astype(np.uint8), "RGB") for image in rounded]


def batches(count: int, size: int) -> Iterator[slice]:
    """Cuts a batch into smaller ones.

    Args:
        count: Pictures of all.
        size: Most pictures of one.

    Yields:
        The parts, in order.
    """
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def commit_of(file: str) -> str:
    """Tells the commit of a file that the Hub's client has fetched.

    Args:
        file: Its path, .../snapshots/COMMIT/NAME in the cache of the Hub.

    Returns:
        The commit; for a file of another place, its name.
    """
    path = Path(file)
    return path.parent.name if path.parent.parent.name == "snapshots" else path.name


def add_model_options(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Adds what all scripts ask for.

    Args:
        parser: The script's parser.
        batch_size: The default number of pictures of one forward.
    """
    parser.add_argument("--device", default="cuda", help="where the model runs: cuda, cuda:1 or cpu")
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=batch_size,
        help="pictures of one forward; more need more memory",
    )


def positive(text: str) -> int:
    """Reads a number from 1 up.

    Args:
        text: What was given on the command line.

    Returns:
        The number.

    Raises:
        ArgumentTypeError: If it is none.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return number


def commit(text: str) -> str:
    """Reads a commit, of code that will be executed.

    Args:
        text: What was given on the command line.

    Returns:
        The commit.

    Raises:
        ArgumentTypeError: If it is none.
    """
    if not re.fullmatch("[0-9a-f]{40}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no commit of 40 hexadecimal digits, and branches and tags move")
    return text
