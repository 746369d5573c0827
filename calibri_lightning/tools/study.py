"""What `ablate` and `sweep` share: a run or a config is opened as `test` opens it, and its prompts are gone through.

A study is done in the place of a test: the same backbone, weights, device, precision, prompts and noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibri_lightning.cli import CalibriCLI, parse_fit, run
from calibri_lightning.commandline import OneLineParser, cleaning_up_when_terminated, exit_code
from calibri_lightning.errors import UserError
from calibri_lightning.module import CalibriModule
from calibri_lightning.prompts import PromptBatch
from calibri_lightning.tools.drawing import PictureStudy


class StudyModule(CalibriModule):
    """A module whose test is a study."""

    study: PictureStudy

    def on_test_start(self) -> None:
        """Settles what a stage needs of the device.

        Raises:
            UserError: If there is more than one process.
        """
        if self.trainer.world_size > 1:
            raise UserError(
                f"The study was given {self.trainer.world_size} processes, but runs in one. Leave out trainer.devices, "
                "trainer.num_nodes and the launcher."
            )
        super().on_test_start()

    def on_test_epoch_start(self) -> None:
        """Prepares the study."""
        self.study.start(self)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Hands the prompts on: which of them are drawn together is the study's to say."""
        self.study.add(self, batch.prompts, self.noise_seeds(batch))

    def on_test_epoch_end(self) -> None:
        """Draws what is left, and writes what was found."""
        self.study.finish(self)


@dataclass(frozen=True)
class Source:
    """What is studied, and on what."""

    run: Path | None
    """Folder of a run; None where a config is given instead."""
    out: Path
    """Folder of the results."""
    arguments: tuple[str, ...]
    """Arguments of `test`."""


def study_parser(command: str) -> argparse.ArgumentParser:
    """Makes the parser of a study, with the options that all have.

    Args:
        command: Its name.

    Returns:
        The parser, which raises `UserError`; `open_source` reads its result.
    """
    parser = OneLineParser(prog=f"calibri_lightning {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    parser.add_argument("--prompts")
    parser.add_argument("--num_prompts", type=int)
    return parser


def run_command(arguments: Sequence[str], usage: str, work: Callable[[Sequence[str]], int]) -> int:
    """Runs the command of a study.

    Args:
        arguments: What follows its name.
        usage: Its help.
        work: What it does with the arguments; returns an exit code.

    Returns:
        Exit code: 0, 2 for a user's mistake, and as of `cli.run`.
    """
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(usage, end="")
        return 0
    # Lightning only notes SIGTERM during a test, and calls the handler that was there before.
    with cleaning_up_when_terminated():
        return exit_code(lambda: work(arguments))


def open_source(
    command: str, parser: argparse.ArgumentParser, words: Sequence[str]
) -> tuple[argparse.Namespace, Source]:
    """Reads the command line of a study.

    Args:
        command: Its name, which is that of the default folder of the results, too.
        parser: Made by `study_parser`.
        words: What follows the command: RUN first, or --config FILE; then options and overrides in any order.

    Returns:
        The study's own options, and what is studied.

    Raises:
        UserError: If there is neither run nor config, or no prompts.
    """
    folder = Path(words[0]) if words and not words[0].startswith("-") else None
    own, rest = parser.parse_known_args(words if folder is None else words[1:])
    if own.num_prompts is not None and own.num_prompts < 1:
        raise UserError(f"--num_prompts is {own.num_prompts}; it must be at least 1.")
    if own.prompts == "":
        raise UserError("--prompts is empty. Give a file of prompts or another source, or leave it out.")
    if folder is not None:
        rest = [*_of_run(folder), *rest]
    elif not any(word == "--config" or word.startswith("--config=") for word in rest):
        raise UserError(
            f"{command} needs a model: right after the word {command} give the folder of a run, or --config FILE. All "
            f"options: {command} --help"
        )
    checkpoint = [] if folder is None else [f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"]
    config = parse_fit(rest)
    out = Path(own.out) if own.out else (folder or _root(config)) / command
    data = _data(config["data"], own.prompts, own.num_prompts)
    plain = ["--trainer.logger=false", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
    words = ["test", *rest, *checkpoint, *data, *plain, f"--trainer.default_root_dir={out}"]
    return own, Source(folder, out, tuple(words))


def run_study(source: Source, study: PictureStudy) -> int:
    """Does a study.

    Args:
        source: What is studied.
        study: What is done.

    Returns:
        Exit code, as of `cli.run`.
    """

    class StudyCLI(CalibriCLI):
        """Hands the study to the module."""

        def instantiate_classes(self) -> None:
            """Makes the classes."""
            super().instantiate_classes()
            self.model.study = study

    return run(source.arguments, StudyCLI, StudyModule)


def _of_run(folder: Path) -> list[str]:
    for path in (folder / "config.yaml", folder / "checkpoints" / "last.ckpt"):
        if not path.is_file():
            raise UserError(
                f"{folder} is no finished run: it has no {path.relative_to(folder)}. Give the folder that a fit named "
                "(with config.yaml and checkpoints/), or --config FILE."
            )
    return ["--config", str(folder / "config.yaml")]


def _root(config: dict[str, Any]) -> Path:
    return Path(str(config["trainer"]["default_root_dir"] or ".")) / str(config["name"])


def _data(config: dict[str, Any], prompts: str | None, count: int | None) -> list[str]:
    """The prompts of the study, in the place of the test's: the validation prompts, unless others are named.

    What is learned from a study is used to choose, and the test prompts are to be reported on after all choices.
    """
    part = "val" if config["val"] is not None else "test"
    source = prompts or config[part]
    if source is None:
        raise UserError("There are no prompts: the config has neither data.val nor data.test. Give --prompts SOURCE.")
    size = count if count is not None or prompts else config[f"{part}_size"]
    return [f"--data.test={source}", f"--data.test_size={'null' if size is None else size}"]
