"""The command line's parser: what a configuration may name briefly, and how it is told what is wrong."""

from __future__ import annotations

from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from calibri_lightning.backbones import FLUX1, FLUX2, SD3, Krea2, Lumina2, QwenImage, Stock, ZImage
from calibri_lightning.ranks import print_once
from calibri_lightning.strategies import CMAES, PairES

SHORT_NAMES = (SD3, FLUX1, FLUX2, QwenImage, ZImage, Lumina2, Krea2, Stock, PairES, CMAES)
"""Classes that a configuration may name without their module."""


class OneMessageParser(LightningArgumentParser):
    """Says what is wrong in one line, without the hundred options of the usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message and exits with code 2.

        Args:
            message: What is wrong.
            ex: The cause.

        Raises:
            ArgumentError: Where the caller wants exceptions, as jsonargparse itself does inside.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        text = " ".join(message.replace("Parser key ", "").split()).rstrip(".")
        if '"model.rewards"' in text:
            # What jsonargparse says of a union is a list of all that it tried; the value comes last.
            text = (
                f"model.rewards does not take {text.rpartition(' value: ')[2]}; each reward has a weight, or a weight "
                "with options: {pickscore: 1.0} or {pickscore: {weight: 1.0, options: {dtype: bfloat16}}}"
            )
        elif "Expected a dot import path" in text:
            names = ", ".join(known.__name__ for known in SHORT_NAMES)
            text += f" (built in are {names}; others go as package.module.Class)"
        print_once(f"error: {text}. All options: {parser.prog.replace(' [options]', '')} --help")
        self.exit(2)
