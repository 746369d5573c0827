"""The LightningCLI behind `python -m calibri_lightning`: fit, validate, test, predict."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

# Imported so that YAML may name them without a path: `class_path: PairES`.
from calibri_lightning.backbones import SD3  # noqa: F401
from calibri_lightning.data import PromptData
from calibri_lightning.errors import UserError
from calibri_lightning.module import CalibriModule
from calibri_lightning.strategies import CMAES, PairES  # noqa: F401

set_parsing_settings(add_print_completion_argument=True)

TRAINER_DEFAULTS: dict[str, Any] = {
    # Steps are generations: nothing happens at an epoch's end, for there is one endless epoch.
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    # Every rank sees all prompts; strategies share the work themselves.
    "use_distributed_sampler": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "default_root_dir": "runs",
}


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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds TensorBoard and CSV logs and a checkpoint after every generation, unless others are configured.

        Args:
            **kwargs: Overrides of the configured arguments.

        Returns:
            The trainer.
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
        callbacks = list(trainer["callbacks"] or [])
        if trainer["enable_checkpointing"] is not False and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            checkpoint = ModelCheckpoint(
                filename="last", every_n_train_steps=1, save_top_k=1, enable_version_counter=False
            )
            kwargs["callbacks"] = [*callbacks, checkpoint]
        return super().instantiate_trainer(**kwargs)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: the parent lets a checkpoint's settings override the command line (Lightning issue #20801)."""

    def after_fit(self) -> None:
        """Tests the answer on the held-out prompts."""
        if self.config[self.subcommand]["test_after_fit"] and self.datamodule.sources["test"] is not None:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: The command and its options.

    Returns:
        Exit code: 0, 2 for a user's mistake, 130 when interrupted.
    """
    _quieten()
    try:
        CalibriCLI(
            CalibriModule,
            PromptData,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "calibri_lightning"},
            # Lightning warns when arguments are passed beside those of the process.
            args=None if list(arguments) == sys.argv[1:] else list(arguments),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; resume with --ckpt_path RUN/checkpoints/last.ckpt", file=sys.stderr)
        return 130
    return 0


def _quieten() -> None:
    """Silences what says nothing to a user of this program; warnings about his own settings stay."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        # The three below describe this design: no optimiser, a frozen model, the state after a generation.
        ".*`LightningModule.configure_optimizers` returned `None`.*",
        ".*module\\(s\\) in eval mode at the start of training.*",
        ".*Using ModelCheckpoint with manual optimization.*",
    ):
        warnings.filterwarnings("ignore", pattern)
