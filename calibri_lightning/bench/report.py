"""What a benchmark found: as JSON for machines, as lines for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from calibri_lightning.bench.comparison import LoopResult
from calibri_lightning.bench.growth import GrowthPoint
from calibri_lightning.bench.measure import Memory, Spread
from calibri_lightning.bench.order import OrderCheck
from calibri_lightning.bench.overhead import Overhead
from calibri_lightning.bench.roofline import Roof
from calibri_lightning.errors import UserError


@dataclass(frozen=True)
class Report:
    """A whole benchmark."""

    date: str
    """When it ended, UTC."""
    command: str
    """With which it was made."""
    machine: str
    """Processor or GPU, threads, versions."""
    model: str
    """Model and its size."""
    job: str
    """Candidates, prompts, steps, members."""
    roof: Roof
    loops: tuple[LoopResult, ...]
    """The straightforward one first."""
    overhead: Overhead
    """What scales cost, in the first setting."""
    forward_peak_share: float
    """Arithmetic of a plain forward, without anything around it, over the matmul peak of the first setting."""
    scoring_share: float
    """Scoring's part of the time of the first batched loop."""
    decoding_share: float
    """Decoding's part of it."""
    encoding_share: float
    """Encoding's part of the time of the straightforward loop."""
    order: tuple[OrderCheck, ...]
    """Empty where not asked for."""
    growth: tuple[GrowthPoint, ...]
    """Empty where not asked for."""

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
        parts = [self.machine, self.model, self.job, "", *self._loop_lines(), "", *self._roof_lines()]
        lines = [*parts, *self._scale_lines(), *self._share_lines()]
        lines += [
            f"order of {check.num_candidates} candidates, {check.setting} as in float32: Spearman {check.spearman:.4f}"
            for check in self.order
        ]
        return "\n".join([*lines, *self._growth_lines()])

    def _loop_lines(self) -> list[str]:
        head = f"{'loop':<30}{'images/s':>9}{'forwards/s':>11}{'speed-up':>22}{'of peak':>9}{'peak memory':>20}"
        rows = [
            f"{loop.name:<30}{loop.images_per_second:>9.3g}{loop.forwards_per_second:>11.4g}"
            f"{format_spread(loop.speedup):>22}{loop.peak_share:>9.0%}{format_memory(loop.memory):>20}"
            for loop in self.loops
        ]
        return [head, "-" * len(head), *rows]

    def _roof_lines(self) -> list[str]:
        peaks = ", ".join(f"{name} {peak / 1e9:,.0f} GFLOP/s" for name, peak in self.roof.matmul_peaks.items())
        return [f"roofline: {self.roof.flops_per_row / 1e9:.3g} GFLOP a row; measured matmul peak {peaks}"]

    def _scale_lines(self) -> list[str]:
        found = self.overhead
        plain = (
            f"a plain forward of {found.rows} rows, {found.plain_seconds:.3g} s, {self.forward_peak_share:.0%} of peak"
        )
        return [f"scales, over {plain}: attached {_percent(found.attached)}, folded {_percent(found.folded)}"]

    def _share_lines(self) -> list[str]:
        return [
            f"of the first batched loop: decoding {self.decoding_share:.1%}, scoring {self.scoring_share:.1%}; "
            f"of the straightforward one: encoding {self.encoding_share:.1%}"
        ]

    def _growth_lines(self) -> list[str]:
        return [
            f"popsize {point.popsize:>4}: {point.timing.median:8.2f} s, {point.timing.median / point.popsize:.3f} s a "
            f"candidate, peak memory {format_memory(point.memory)}"
            for point in self.growth
        ]


def write_json(path: Path, fields: Mapping[str, object]) -> None:
    """Writes a report.

    Args:
        path: The file.
        fields: The report's fields by name.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"The benchmark's result cannot be written to {path} ({error.strerror}).") from error


def format_spread(value: Spread) -> str:
    """Writes a ratio.

    Args:
        value: The ratio.

    Returns:
        Median and quartiles.
    """
    return f"{value.median:.2f}x ({value.low:.2f}-{value.high:.2f})"


def _percent(value: Spread) -> str:
    return f"{value.median:+.1%} ({value.low:+.1%} to {value.high:+.1%})"


def format_memory(memory: Memory | None) -> str:
    """Writes a peak of memory, and in brackets what the run itself needed.

    Args:
        memory: What was measured, if it can be.

    Returns:
        GiB.
    """
    if memory is None:
        return "unknown"
    return f"{memory.peak_bytes / 2**30:.2f} GiB (+{memory.working_bytes / 2**30:.2f})"
