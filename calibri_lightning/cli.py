"""The LightningCLI behind `python -m calibri_lightning`: fit, validate, test, predict."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry

from calibri_lightning.checkpoint import CheckpointFiles, ResumeHint, RunCheckpoint, check_exists
from calibri_lightning.data import PromptData
from calibri_lightning.errors import UserError
from calibri_lightning.module import PROMPT_PARTS, CalibriModule
from calibri_lightning.naming import explain
from calibri_lightning.prompts import check_source
from calibri_lightning.quiet import quieten
from calibri_lightning.ranks import print_once
from calibri_lightning.rewards.finding import check_reward
from calibri_lightning.sharding.strategy import Sharded

set_parsing_settings(add_print_completion_argument=True)
StrategyRegistry.register("sharded", Sharded, "FSDP2 for the frozen transformer, one copy on all ranks", override=True)

TRAINER_DEFAULTS: dict[str, Any] = {
    # Steps are generations: nothing happens at an epoch's end, for there is one endless epoch.
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    # Generations. Lightning's own default, a share of an epoch, would mean never.
    "val_check_interval": 10,
    # Every rank sees all prompts; strategies share the work themselves.
    "use_distributed_sampler": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "default_root_dir": "runs",
}


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
        print_once(f"error: {explain(message)}. All options: {parser.prog.replace(' [options]', '')} --help")
        self.exit(2)


class RunConfig(SaveConfigCallback):
    """Writes config.yaml, with which a fit runs again as it is; other commands leave a fit's file alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the file before anything is computed.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: "fit" or another command.

        Raises:
            UserError: If the folder holds another fit.
        """
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        there = trainer.strategy.broadcast((folder / self.config_filename).is_file())
        if there and stage == "fit" and not self.already_saved and not self.config.get("ckpt_path"):
            raise UserError(
                f"The run folder {folder} holds an earlier run. Each run has a folder of its own: give another "
                "--trainer.default_root_dir, or keep trainer.logger, which numbers the folders."
            )
        self.overwrite = True
        if stage == "fit" or not there:
            super().setup(trainer, pl_module, stage)


class CalibriCLI(LightningCLI):
    """LightningCLI with this project's defaults, loggers and checkpoints."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `name` and `test_after_fit`, and passes one seed to module and data.

        Args:
            parser: The parser of a subcommand.
        """
        parser.add_argument("--name", type=str, default="calibri", help="Folder of the runs under default_root_dir.")
        parser.add_argument(
            "--test_after_fit", type=bool, default=True, help="Test on data.test, where given, when fit ends."
        )
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def instantiate_classes(self) -> None:
        """Makes the classes; what one of them refuses is said as it says it.

        Raises:
            UserError: If a class refuses its arguments.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what is raised inside of an optional class (jsonargparse 4.53).
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise

    def before_instantiate_classes(self) -> None:
        """Checks what can be checked before a model is loaded.

        Raises:
            UserError: If prompts, rewards or the checkpoint are not there, or the run's folder cannot be written.
        """
        config = self.config[self.subcommand]
        interval = config["trainer"]["val_check_interval"]
        if isinstance(interval, float):
            raise UserError(
                f"trainer.val_check_interval is {interval}; it counts generations between validations and must be a "
                "whole number, such as 10. A share of an epoch means nothing here: the one epoch is endless."
            )
        if self.subcommand == "fit" and config["trainer"]["max_steps"] == 0:
            raise UserError(
                "trainer.max_steps is 0, so nothing would be searched. Give the number of generations, or -1 together "
                "with another end such as the strategy's max_images."
            )
        for part in PROMPT_PARTS:
            if config["data"][part] is not None:
                check_source(config["data"][part])
        # What draws pictures without scoring them needs no servers.
        for name, reward in rewards_of(config["model"]) if self.subcommand != "predict" else ():
            check_reward(getattr(reward, "reward", None) or name, getattr(reward, "options", None))
        if config.get("ckpt_path"):
            check_exists(config["ckpt_path"])
        root = config["trainer"]["default_root_dir"] or "."
        if "://" not in str(root):
            _check_writable(Path(str(root)))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds TensorBoard and CSV logs, unless others are configured, and a checkpoint after every generation.

        Args:
            **kwargs: Overrides of the configured arguments.

        Returns:
            The trainer.

        Raises:
            UserError: If Lightning refuses the arguments.
        """
        config = self.config_init[self.subcommand]
        trainer = config["trainer"]
        if trainer["logger"] in (None, True) and not trainer["fast_dev_run"]:
            board = TensorBoardLogger(trainer["default_root_dir"], name=config["name"], default_hp_metric=False)
            # The same folder; CSVLogger would otherwise number its own.
            rows = CSVLogger(
                board.save_dir, name=config["name"], version=f"version_{board.version}", flush_logs_every_n_steps=1
            )
            kwargs["logger"] = [board, rows]
        plugins = _as_list(trainer["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, CheckpointFiles()]
        if trainer["enable_checkpointing"] is not False:
            kwargs["callbacks"] = [*_as_list(trainer["callbacks"]), RunCheckpoint()]
        try:
            made = super().instantiate_trainer(**kwargs)
        except UserError:
            raise
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise UserError(f"The trainer refuses its arguments: {error} Correct them under trainer.") from error
        if isinstance(made.accelerator, MPSAccelerator):
            raise UserError(
                "The accelerator is MPS, which has no float64; theta and the rewards are float64. Use "
                "--trainer.accelerator cpu (or gpu with CUDA)."
            )
        return made

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Lightning's own tables of metrics would stand beside ours.
        return super()._prepare_subcommand_kwargs(subcommand) | (
            {"verbose": False} if subcommand in ("validate", "test") else {}
        )

    def _parse_ckpt_path(self) -> None:
        """Does nothing: the parent lets a checkpoint's settings override the command line (Lightning issue #20801)."""

    def after_fit(self) -> None:
        """Tests the answer on the held-out prompts."""
        if self.config[self.subcommand]["test_after_fit"] and self.datamodule.sources["test"] is not None:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


class _ParsingCLI(CalibriCLI):
    """Parses and stops there."""

    def before_instantiate_classes(self) -> None:
        """Checks nothing, makes no folder."""

    def instantiate_classes(self) -> None:
        """Makes nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def parse_fit(arguments: Sequence[str]) -> dict[str, Any]:
    """Reads the configuration of a fit as `fit` does, without making any of its objects.

    Args:
        arguments: What follows the word fit.

    Returns:
        All settings by name, nested; classes as class_path and init_args.
    """
    quieten()
    return dict(_start(["fit", *arguments], ResumeHint(), _ParsingCLI).config["fit"].as_dict())


def run(
    arguments: Sequence[str],
    cli: Callable[..., CalibriCLI] = CalibriCLI,
    module: type[CalibriModule] = CalibriModule,
) -> int:
    """Runs one command.

    Args:
        arguments: The command and its options.
        cli: Makes the command line, for commands that prepare the module in their own way.
        module: What is run, for commands that do something else than fit and test with it.

    Returns:
        Exit code: 0, 2 for a user's mistake, 130 when interrupted, 143 when terminated.
    """
    quieten()
    hint = ResumeHint()
    try:
        _start(arguments, hint, cli, module)
    except UserError as error:
        print_once(f"error: {error}")
        hint.print()
        return 2
    except MisconfigurationException as error:
        print_once(f"error: the trainer refuses its arguments: {error}")
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print_once(
            f"error: {where}{error.strerror or error}. The run could not read or write a file: free space, or choose a "
            "folder that you may write to with --trainer.default_root_dir."
        )
        hint.print()
        return 2
    except SystemExit as stop:  # --help, the parser's errors, and Lightning's answers to Ctrl+C and SIGTERM
        if hint.exit_code is not None:
            print("interrupted", file=sys.stderr)
            hint.print()
            return hint.exit_code
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BaseException:
        hint.print()
        raise
    return 0


def _start(
    arguments: Sequence[str],
    hint: ResumeHint,
    cli: Callable[..., CalibriCLI] = CalibriCLI,
    module: type[CalibriModule] = CalibriModule,
) -> CalibriCLI:
    return cli(
        module,
        PromptData,
        save_config_callback=RunConfig,
        seed_everything_default=0,
        trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [hint]},
        auto_configure_optimizers=False,
        parser_class=OneMessageParser,
        parser_kwargs={"prog": "calibri_lightning"},
        args=list(arguments),
    )


def rewards_of(model: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Lists the rewards of a configuration, those held out last.

    Args:
        model: The part of the configuration under model.

    Yields:
        Name and settings.
    """
    held_out = model["held_out"] or {}
    yield from model["rewards"].items()
    yield from held_out.items() if isinstance(held_out, Mapping) else ((name, None) for name in held_out)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be written ({error.strerror or error}); runs go there. Free space, or choose "
            "another with --trainer.default_root_dir."
        ) from error


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
