"""What follows a run generation by generation: the progress line, and the record for the convergence plot."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer

from calibri_lightning.evaluation.progress import GenerationStats, format_progress
from calibri_lightning.trace import stats_of


class ProgressLine(Callback):
    """Shows `module.last_generation`, a `GenerationStats` or None, after every generation, on rank 0 alone.

    Args:
        seconds_between_lines: Where there is no terminal, at least so many seconds lie between two lines, so
            that a log of thousands of generations stays readable. The first and the last generation are
            always printed.
        stream: Where to print; None takes standard output at the time of printing.
        clock: Seconds on a monotonic clock.
    """

    def __init__(
        self,
        seconds_between_lines: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds_between_lines = seconds_between_lines
        self._stream = stream
        self._clock = clock
        self._seen: GenerationStats | None = None  # the last generation offered to the eye
        self._waiting: GenerationStats | None = None  # held back because the last line is too recent
        self._printed_at: float | None = None
        self._open_characters = 0  # length of an updating line that has no newline yet

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the generation before, for strategies that tell after `on_train_batch_end` reached us."""
        self._update(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Show the generation that just ended."""
        self._update(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last generation and leave the line."""
        self._update(trainer, pl_module)
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the line, so that the message begins on one of its own."""
        self._finish()

    def _update(self, trainer: Trainer, module: LightningModule) -> None:
        stats = getattr(module, "last_generation", None)
        if stats is None or stats == self._seen or not trainer.is_global_zero:
            return
        self._seen = stats
        if self._output.isatty():
            self._rewrite(stats)
        elif self._printed_at is None or self._clock() - self._printed_at >= self.seconds_between_lines:
            self._write_line(stats)
        else:
            self._waiting = stats

    def _finish(self) -> None:
        if self._open_characters:
            print(file=self._output, flush=True)
            self._open_characters = 0
        if self._waiting is not None:
            self._write_line(self._waiting)

    def _write_line(self, stats: GenerationStats) -> None:
        self._waiting, self._printed_at = None, self._clock()
        print(format_progress(stats, ascii_only=self._ascii_only), file=self._output, flush=True)

    def _rewrite(self, stats: GenerationStats) -> None:
        # One column stays free: at a full line some terminals wrap, and the carriage return misses its start.
        width = shutil.get_terminal_size().columns - 1
        line = format_progress(stats, width=width, ascii_only=self._ascii_only)
        # Blanks, not escape codes, cover the rest of a longer line: they work on every terminal.
        print("\r" + line.ljust(min(self._open_characters, width)), end="", file=self._output, flush=True)
        self._open_characters = len(line)

    @property
    def _output(self) -> TextIO:
        return self._stream or sys.stdout

    @property
    def _ascii_only(self) -> bool:
        try:
            "σ·".encode(getattr(self._output, "encoding", None) or "utf-8")
        except (UnicodeEncodeError, LookupError):
            return True
        return False


class TraceRecorder(Callback):
    """Records each generation and its pace: after the strategy told it, before a checkpoint is saved."""

    def __init__(self) -> None:
        self._started_at, self._images_before = 0.0, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes when a generation begins.

        Args:
            trainer: The trainer.
            pl_module: A CalibriModule.
            batch: Unused.
            batch_idx: Unused.
        """
        self._started_at, self._images_before = time.monotonic(), pl_module.budget.images

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Records the generation that just ended, for the progress line and the plot.

        Args:
            trainer: The trainer.
            pl_module: A CalibriModule.
            outputs: Unused.
            batch: Unused.
            batch_idx: Unused.
        """
        report = getattr(pl_module.strategy, "report", None)
        if report is None:
            return
        images, seconds = pl_module.budget.images - self._images_before, time.monotonic() - self._started_at
        pl_module.trace.add_generation(report)
        pl_module.last_generation = stats_of(report, pl_module.rewards.title, images, seconds)
