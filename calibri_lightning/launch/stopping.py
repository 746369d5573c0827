"""How a run ends before its time: signals, exit codes, and what its user is told."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from calibri_lightning.checkpoint import run_checkpoint
from calibri_lightning.launch.pulse import StopRequested

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Those that schedulers send before they kill: SLURM on `--signal=SIGUSR1@90`, all of them SIGTERM."""


class RunEnd(Callback):
    """Ends a fit that is asked to, on all ranks together and at a place from which it goes on exactly.

    SIGTERM and SIGUSR1 let the rank that gets them finish its unit of pictures, which is then on record; at their next
    exchange all ranks stop. The last checkpoint is that of the last finished training step. Lightning's own handler is
    replaced: on several processes it starts a collective in the middle of whatever its process is doing, which hangs
    where only one got the signal (lightning 2.6.6).
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        """That of a run ended by a signal, 128 and its number, as shells and schedulers know it."""
        self._hint = ""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes the signals of a fit.

        Args:
            trainer: Unused.
            pl_module: The module, whose pulse is told.
        """

        def ask(number: int, _: FrameType | None) -> None:
            pl_module.pulse.stop = number

        _handle(ask)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes the signals of a validation by itself.

        Args:
            trainer: The trainer.
            pl_module: Unused.
        """
        if trainer.state.fn != "fit":
            _handle(_exit)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes the signals of a test: there is nothing to go on from, so it ends at once.

        Args:
            trainer: Unused.
            pl_module: Unused.
        """
        _handle(_exit)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes the signals while pictures are drawn.

        Args:
            trainer: Unused.
            pl_module: Unused.
        """
        _handle(_exit)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Notes what happened and where the last checkpoint is.

        Args:
            trainer: The trainer.
            pl_module: The module; its strategy says what a step is called.
            exception: What ended the run.
        """
        if isinstance(exception, KeyboardInterrupt):
            self.exit_code = 128 + signal.SIGINT
        elif isinstance(exception, StopRequested):
            self.exit_code = 128 + exception.number
        elif isinstance(exception, SIGTERMException):
            self.exit_code = 128 + signal.SIGTERM
        checkpoint = run_checkpoint(trainer)
        if trainer.state.fn != "fit" or not trainer.is_global_zero or checkpoint is None:
            return
        if checkpoint.path.is_file():
            step = pl_module.strategy.words.step
            self._hint = f"To go on from the last finished {step}, add --ckpt_path {checkpoint.path}"

    def print_hint(self) -> None:
        """Prints how to go on, if there is something to go on from."""
        if self._hint:
            print(self._hint, file=sys.stderr)


def _handle(handler: Any) -> None:
    # Only the main thread may; where a run is in another one, whoever started it has the signals.
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, handler)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
