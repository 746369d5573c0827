"""Is the text that the prompt asks for in the picture? Read by rapidocr, whose models come with its wheel.

The score is that of Flow-GRPO (arXiv 2505.05470; flow_grpo/ocr.py of yifan123/flow_grpo), with another
reader: 1 - min(edit distance, n) / n for a target of n characters, where text around an exact copy costs nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.base import ModelInfo, Reward
from calibri_lightning.rewards.pixels import to_pixels

TEXT_KEY = "text"
"""Metadata that can hold the text to write; it goes before what the prompt quotes."""

_QUOTED = re.compile('"([^"]*)"|“([^“”]*)”|„([^„“”]*)[“”]|«([^«»]*)»|「([^「」]*)」')


def normalised(text: str) -> str:
    """What counts of a text: lower case without white space, as in Flow-GRPO, and wide characters as narrow ones.

    Args:
        text: A text.

    Returns:
        Its characters in Unicode's form NFKC.
    """
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def edit_distance(one: str, other: str) -> int:
    """The fewest insertions, deletions and replacements that make one text of another (Levenshtein).

    Args:
        one: A text.
        other: Another.

    Returns:
        Their number.
    """
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one, start=1):
        line = [row]
        for column, wanted in enumerate(other, start=1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (letter != wanted)))
        above = line
    return above[-1]


def text_score(read: str, wanted: Sequence[str], exact: bool = False) -> float:
    """How much of the wanted text was read.

    Args:
        read: The text in the picture, line by line.
        wanted: The parts of the wanted text, at least one of them not blank.
        exact: Whether text around the wanted one is an error.

    Returns:
        1 - errors / n for n wanted characters. Errors are the edit distance between all that was read and all that is
        wanted, but at most n and, unless `exact`, at most the length of those parts of which there is no copy.
    """
    found, parts = normalised(read), [normalised(part) for part in wanted]
    total = sum(map(len, parts))
    missing = total if exact else sum(len(part) for part in parts if part not in found)
    return 1 - min(edit_distance(found, "".join(parts)), missing) / total


def wanted_text(prompt: Prompt) -> tuple[str, ...]:
    """The text that a prompt asks for.

    Args:
        prompt: The prompt.

    Returns:
        Its metadata "text" if there is one, or the parts of the prompt in double quotes ("", “”, „“, «», 「」) in their
        order, without blank ones.
    """
    given = prompt.metadata.get(TEXT_KEY)
    if given is None:
        found = tuple("".join(groups) for groups in _QUOTED.findall(prompt.text))
    else:
        found = (given,) if isinstance(given, str) else ()
    return tuple(part for part in found if normalised(part))


class Ocr(Reward):
    """Scores pictures by the text in them, on the CPU.

    One thread reads one picture after the other; the same picture always has the same score.
    """

    name = "ocr"
    pixels = "uint8"

    def __init__(self, exact: bool = False, min_confidence: float = 0.5, num_threads: int = 1) -> None:
        """Loads nothing yet.

        Args:
            exact: Count text around the wanted one as errors. By default it is free, as in Flow-GRPO.
            min_confidence: Lines that the reader is less sure of, 0..1, are not counted as read.
            num_threads: Threads of the reader.

        Raises:
            UserError: If an option is none of these.
        """
        if not isinstance(exact, bool):
            raise UserError(f"exact of the reward 'ocr' is {exact!r}; it must be true or false.")
        if isinstance(min_confidence, bool) or not isinstance(min_confidence, int | float):
            raise UserError(f"min_confidence of the reward 'ocr' is {min_confidence!r}; it must be a number in 0..1.")
        if not 0 <= min_confidence <= 1:
            raise UserError(f"min_confidence of the reward 'ocr' is {min_confidence}; it must lie in 0..1.")
        if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 1:
            raise UserError(f"num_threads of the reward 'ocr' is {num_threads!r}; it must be a number from 1 up.")
        self._exact, self._min_confidence, self._num_threads = exact, float(min_confidence), num_threads

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuses prompts that ask for no text, and loads the reader.

        Args:
            prompts: The prompts.

        Raises:
            UserError: If a prompt asks for no text, or rapidocr is missing.
        """
        for prompt in prompts:
            if not wanted_text(prompt):
                raise UserError(
                    f"The reward 'ocr' cannot score the prompt {prompt.text!r} (row {prompt.index + 1}): it asks for "
                    "no text. The rule is a part in double quotes, for instance 'a shop sign that says \"open\"', or "
                    f"a column {TEXT_KEY!r} with the text. Quote the text, or take the prompt out."
                )
        _ = self._reader

    def describe(self) -> ModelInfo:
        """Says what reads.

        Returns:
            rapidocr and its version, which comes with its models.

        Raises:
            UserError: If rapidocr is missing.
        """
        try:
            return ModelInfo("rapidocr", version("rapidocr"), f"min_confidence {self._min_confidence:g}")
        except PackageNotFoundError as error:
            raise _missing(error) from error

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores pictures.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: The prompt of each picture.

        Returns:
            float32 [B] in 0..1; 0 for a picture without text.

        Raises:
            UserError: If a prompt asks for no text, or rapidocr is missing.
        """
        self.check(prompts)
        pictures = zip(to_pixels(images), prompts, strict=True)
        return torch.tensor([text_score(self.read(pixels), wanted_text(p), self._exact) for pixels, p in pictures])

    def read(self, pixels: NDArray[np.uint8]) -> str:
        """Reads a picture.

        Args:
            pixels: uint8 [H, W, 3], red first.

        Returns:
            Its lines, from the top to the bottom and from the left to the right; "" if there is no text.

        Raises:
            UserError: If rapidocr is missing.
        """
        # Blue first, as OpenCV has it.
        found = self._reader(np.ascontiguousarray(pixels[..., ::-1]))
        return "\n".join(found.txts or ())

    @cached_property
    def _reader(self) -> Any:
        try:
            import onnxruntime  # noqa: F401 - rapidocr would miss it only when it reads the first picture
            from rapidocr import RapidOCR
        except ImportError as error:
            raise _missing(error) from error
        threads = "EngineConfig.onnxruntime"
        return RapidOCR(
            params={
                "Global.log_level": "critical",  # also silences "nothing found", which is an answer
                "Global.text_score": self._min_confidence,
                "Global.use_cls": False,  # text on its head is not what was asked for; Flow-GRPO leaves it out too
                f"{threads}.intra_op_num_threads": self._num_threads,
                f"{threads}.inter_op_num_threads": 1,
            }
        )


def _missing(error: Exception) -> UserError:
    return UserError(
        f"The reward 'ocr' needs rapidocr and onnxruntime, which are not installed ({error}). Run pip install "
        "'calibri-lightning[rewards]'."
    )
