"""The LightningCLI behind `python -m calibri_lightning`: fit, validate, test, predict."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from jsonargparse.typing import NonNegativeFloat
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry

from calibri_lightning.checkpoint import CheckpointFiles, RunCheckpoint, check_exists
from calibri_lightning.data import PromptData
from calibri_lightning.errors import UserError
from calibri_lightning.launch.agreement import flat, require_agreement, require_shared, versions
from calibri_lightning.launch.guard import RankGuard
from calibri_lightning.launch.pulse import StopRequested
from calibri_lightning.launch.rendezvous import meet
from calibri_lightning.launch.restart import AUTO, is_of_this_launch, newest_checkpoint, record_attempt
from calibri_lightning.launch.stopping import RunEnd
from calibri_lightning.launch.watch import PATIENCE
from calibri_lightning.module import PROMPT_PARTS, CalibriModule
from calibri_lightning.naming import explain
from calibri_lightning.prompts import check_source
from calibri_lightning.quiet import quieten
from calibri_lightning.ranks import LAUNCH, print_once
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
        fix = "Start the same command from the same files on all machines."
        require_agreement(trainer, "versions", versions(), "Install the same on all machines (constraints.txt).")
        settings = {name: value for name, value in self.config.as_dict().items() if name != "config"}
        require_agreement(trainer, "settings", flat(settings), fix)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        require_shared(trainer, folder)
        there = trainer.strategy.broadcast((folder / self.config_filename).is_file())
        root, name = Path(trainer.default_root_dir), str(self.config["name"])
        again = trainer.strategy.broadcast(is_of_this_launch(root, name, folder))
        if there and stage == "fit" and not self.already_saved and not self.config.get("ckpt_path") and not again:
            raise UserError(
                f"The run folder {folder} holds an earlier run. Each run has a folder of its own: give another "
                "--trainer.default_root_dir, or keep trainer.logger, which numbers the folders."
            )
        self.overwrite = True
        if stage == "fit" or not there:
            super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and "://" not in str(trainer.default_root_dir):
            record_attempt(root, name, folder)


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
        parser.add_argument(
            "--rank_timeout",
            type=NonNegativeFloat,
            default=PATIENCE,
            help="Seconds without progress after which a rank counts as hung and all ranks end; 0 for never.",
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
        root = config["trainer"]["default_root_dir"] or "."
        if config.get("ckpt_path") == AUTO or (self.subcommand == "fit" and LAUNCH in os.environ):
            self._go_on(Path(str(root)), config["name"])
        if config.get("ckpt_path"):
            check_exists(config["ckpt_path"])
        if "://" not in str(root):
            _check_writable(Path(str(root)))

    def _go_on(self, root: Path, name: str) -> None:
        """Takes the newest checkpoint of this launch, or, for "auto", of the run's name; else what was given."""
        config = self.config[self.subcommand]
        launch = os.environ.get(LAUNCH)
        found = newest_checkpoint(root, name, launch) if launch is not None and self.subcommand == "fit" else None
        if found is None and config.get("ckpt_path") == AUTO:
            found = newest_checkpoint(root, name)
        if found is None and launch is not None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            print_once("This launch has left no checkpoint yet: it starts as it did before")
        if found is not None:
            print_once(f"Going on from {found}")
            config["ckpt_path"] = str(found)
        elif config.get("ckpt_path") == AUTO:
            if self.subcommand != "fit":
                raise UserError(
                    f"--ckpt_path is auto, and there is no whole checkpoint of a run named {name} in {root}. "
                    "Give a path."
                )
            config["ckpt_path"] = None

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
        for callback in self.trainer_defaults["callbacks"]:
            if isinstance(callback, RankGuard):
                callback.patience = config["rank_timeout"]
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
        if SLURMEnvironment.detect() and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            # Its handler of signals would save in the middle of a step and requeue by itself; `RunEnd` does it better.
            kwargs["plugins"] = [*kwargs.get("plugins", plugins), SLURMEnvironment(auto_requeue=False)]
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
    return dict(_start(["fit", *arguments], RunEnd(), RankGuard(), _ParsingCLI).config["fit"].as_dict())


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
        Exit code: 0, 2 for a user's mistake, 75 for a rank that hangs or is gone, 130 when interrupted, 143 on SIGTERM,
        138 on SIGUSR1. Where a rank fails, the others end with its code.
    """
    quieten()
    end, guard = RunEnd(), RankGuard()
    try:
        guard = RankGuard(meet())
    except UserError as error:
        print_once(f"error: {error}")
        return 2
    outcome: BaseException | None = None
    try:
        _start(arguments, end, guard, cli, module)
    except BaseException as error:
        outcome = error
    code, message = _judge(outcome, end, guard)
    # First said, then left: a launcher kills the others' rank 0 as soon as one of them has gone.
    if message:
        print_once(message)
    elif code == _CRASH and outcome is not None and guard.is_active:
        traceback.print_exception(outcome)
    if code:
        end.print_hint()
    guard.leave(code, message or repr(outcome))
    if code == _CRASH and not message and outcome is not None and not guard.is_active:
        raise outcome
    return code


_CRASH = 1


def _judge(error: BaseException | None, end: RunEnd, guard: RankGuard) -> tuple[int, str]:
    """Turns what ended a run into an exit code and a message; 1 for what nobody foresaw."""
    if error is None:
        return 0, ""
    if (other := guard.follows(error)) is not None:
        return other[0], f"error: {other[1]}"
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, MisconfigurationException):
        return 2, f"error: the trainer refuses its arguments: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    # --help, the parser's errors, and the answers to Ctrl+C and other signals
    if isinstance(error, SystemExit | StopRequested):
        if end.exit_code is not None:
            return end.exit_code, "interrupted"
        code = 128 + error.number if isinstance(error, StopRequested) else error.code
        return code if isinstance(code, int) else int(code is not None), ""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return 2, (
            f"error: {where}{error.strerror or error}. The run could not read or write a file: free space, or choose a "
            "folder that you may write to with --trainer.default_root_dir."
        )
    return _CRASH, ""


def _start(
    arguments: Sequence[str],
    end: RunEnd,
    guard: RankGuard,
    cli: Callable[..., CalibriCLI] = CalibriCLI,
    module: type[CalibriModule] = CalibriModule,
) -> CalibriCLI:
    return cli(
        module,
        PromptData,
        save_config_callback=RunConfig,
        seed_everything_default=0,
        trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [end, guard]},
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
