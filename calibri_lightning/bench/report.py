"""What a benchmark found: as JSON for machines, as lines for people."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from calibri_lightning.bench.measure import Timing
from calibri_lightning.errors import UserError


@dataclass(frozen=True)
class LoopResult:
    """One loop on one job."""

    name: str
    """What it is."""
    timing: Timing
    """Its measurements."""
    images_per_second: float
    """Scored pictures a second, at the median time."""
    forwards_per_second: float
    """Transformer rows a second."""
    speedup: float
    """Over the straightforward loop in float32: median of the ratios inside each repetition."""
    peak_share: float
    """Arithmetic of its forwards over the measured matmul peak of its dtype."""


@dataclass(frozen=True)
class Report:
    """A whole benchmark."""

    machine: str
    """Processor or GPU, threads, versions."""
    model: str
    """Model and its size."""
    job: str
    """Candidates, prompts, steps, members."""
    flops_per_row: float
    """FLOP of one transformer row."""
    peaks: dict[str, float]
    """Measured matmul peak by dtype, FLOP/s."""
    loops: tuple[LoopResult, ...]
    """The loops, the straightforward one first."""
    hooks_overhead: float
    """Time of a forward with scales over that of the plain transformer, minus 1."""
    fold_overhead: float
    """Time of a forward with folded scales over that of the plain transformer, minus 1."""
    scoring_share: float
    """Time of the rewards over that of the batched loop."""
    rank_correlation: float | None
    """Spearman's rho between candidates scored in float32 and at the lower precision; None where not asked for."""

    def write(self, path: Path) -> None:
        """Writes JSON.

        Args:
            path: The file.

        Raises:
            UserError: If it cannot be written.
        """
        try:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"The benchmark's result cannot be written to {path} ({error.strerror}).") from error

    def render(self) -> str:
        """Lays the report out for a terminal.

        Returns:
            The lines.
        """
        lines = [self.machine, self.model, self.job, ""]
        lines += [f"{'loop':<28}{'images/s':>10}{'forwards/s':>12}{'speed-up':>10}{'of peak':>9}{'peak memory':>13}"]
        lines += ["-" * len(lines[-1])]
        for loop in self.loops:
            memory = "-" if loop.timing.peak_bytes is None else f"{loop.timing.peak_bytes / 2**30:.2f} GiB"
            lines.append(
                f"{loop.name:<28}{loop.images_per_second:>10.1f}{loop.forwards_per_second:>12.0f}"
                f"{loop.speedup:>9.2f}x{loop.peak_share:>9.0%}{memory:>13}"
            )
        peaks = ", ".join(f"{dtype} {peak / 1e9:,.0f} GFLOP/s" for dtype, peak in self.peaks.items())
        lines += ["", f"roofline: {self.flops_per_row / 1e9:.3g} GFLOP a row; measured matmul peak {peaks}"]
        lines += [f"scales: {self.hooks_overhead:+.1%} attached, {self.fold_overhead:+.1%} folded, of a forward's time"]
        lines += [f"rewards: {self.scoring_share:.1%} of the batched loop's time"]
        if self.rank_correlation is not None:
            lines.append(
                f"order of the candidates, float32 against lower precision: Spearman {self.rank_correlation:.4f}"
            )
        return "\n".join(lines)
