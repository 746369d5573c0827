"""What a benchmark of training found: as JSON for machines, as lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from calibri_lightning.bench.report import format_memory, format_spread, write_json
from calibri_lightning.bench.training import PassResult, StepResult


@dataclass(frozen=True)
class TrainingReport:
    """A whole benchmark of training."""

    date: str
    """When it ended, UTC."""
    command: str
    """With which it was made."""
    machine: str
    """Processor or GPU, threads, versions."""
    model: str
    """Model and its size."""
    job: str
    """Prompts, pictures, steps, precision."""
    steps: tuple[StepResult, ...]
    """Training steps of each recipe and variant."""
    passes: tuple[PassResult, ...]
    """Single passes of each variant."""

    def write(self, path: Path) -> None:
        """Writes JSON.

        Args:
            path: The file.

        Raises:
            UserError: If it cannot be written.
        """
        write_json(path, asdict(self))

    def render(self) -> str:
        """Lays the report out for a terminal.

        Returns:
            The lines.
        """
        steps, passes = _step_lines(self.steps), _pass_lines(self.passes)
        return "\n".join([self.machine, self.model, self.job, "", *steps, "", *passes])


def _step_lines(results: Sequence[StepResult]) -> list[str]:
    head = (
        f"{'training step':<30}{'images/s':>9}{'forwards/image':>16}{'on paper':>10}{'forwards/s':>12}"
        f"{'peak memory':>20}{'largest |r - 1|':>17}"
    )
    rows = [
        f"{f'{result.recipe}, {result.variant.name}':<30}{result.images_per_second:>9.3g}"
        f"{result.forwards_per_image:>16.4g}{result.on_paper:>10}"
        f"{result.images_per_second * result.forwards_per_image:>12.4g}{format_memory(result.memory):>20}"
        f"{result.ratio_deviation:>17.2g}"
        for result in results
    ]
    return [head, "-" * len(head), *rows, "a backward counts as one more forward; r is the ratio before an update"]


def _pass_lines(results: Sequence[PassResult]) -> list[str]:
    return [
        f"a forward with its backward over a forward, {result.variant.name}: {format_spread(result.with_backward)}, "
        f"the forward of {result.rows} rows {result.forward_seconds:.3g} s"
        for result in results
    ]
