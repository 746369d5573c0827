"""What `bench --scaling` found: as JSON for machines, as lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from calibri_lightning.bench.measure import Spread
from calibri_lightning.bench.processes import Processes
from calibri_lightning.bench.report import format_spread, write_json
from calibri_lightning.bench.simulation import Cost, Generated, Work

EACH = "each"
CUTS: Mapping[str, int] = {EACH: 0, "24": 24, "1": 1}
"""What `model.balance_over` is in a simulation: the number of ranks (0), that of the shipped files, the default."""


@dataclass(frozen=True)
class ScalingReport:
    """A whole benchmark."""

    date: str
    """When it ended, UTC."""
    command: str
    """With which it was made."""
    machine: str
    """Processor, cores, versions, and what else it did."""
    work: Work
    cost: Cost
    simulated: Mapping[str, tuple[Generated, ...]]
    """A generation on each number of ranks, by what `CUTS` calls `balance_over`."""
    model: str
    """What real processes ran."""
    cores: int
    """Of this machine."""
    processes: tuple[Processes, ...]
    """Empty where not asked for."""

    def write(self, path: Path) -> None:
        """Writes JSON; of what ranks drew, the busiest stands for all.

        Args:
            path: The file.

        Raises:
            UserError: If it cannot be written.
        """
        fields = asdict(self)
        fields["simulated"] = {
            name: [{**_without_loads(point), "busiest": point.busiest} for point in points]
            for name, points in self.simulated.items()
        }
        write_json(path, fields)

    def render(self) -> str:
        """Lays the report out for a terminal.

        Returns:
            The lines.
        """
        work, cost = self.work, self.cost
        lines = [
            self.machine,
            "",
            f"simulated: {work.popsize} candidates x {work.bucket} prompts = {work.num_pictures} pictures, at most "
            f"{work.pictures_per_unit} a unit; {cost.picture_seconds:g} s a picture + {cost.unit_seconds:g} s a unit, "
            f"{cost.jitter:.0%} noise, seed {cost.seed}, last rank {cost.slowdown:g}x as long",
            *self._simulated_lines(),
        ]
        return "\n".join([*lines, *self._process_lines()])

    def _simulated_lines(self) -> list[str]:
        head = (
            f"{'ranks':>5}{'units':>7}{'busiest':>9}{'s/generation':>14}{'from rank 0':>13}{'to rank 0':>13}"
            f"{'idle':>8}{'idle, 24':>10}{'idle, 1':>9}"
        )
        rows = [
            f"{point.world_size:>5}{point.num_units:>7}{point.busiest:>9}{point.seconds:>14.4g}"
            f"{format_bytes(point.sent_bytes):>13}{format_bytes(point.received_bytes):>13}{point.idle_share:>8.1%}"
            f"{shipped.idle_share:>10.1%}{plain.idle_share:>9.1%}"
            for point, shipped, plain in zip(*(self.simulated[name] for name in CUTS), strict=True)
        ]
        note = (
            "balance_over is the number of ranks; in the last two columns 24, as in shipped files, and 1, the default"
        )
        return [head, "-" * len(head), *rows, note]

    def _process_lines(self) -> list[str]:
        if not self.processes:
            return []
        head = (
            f"{'processes':>9}{'images/s':>10}{'speed-up':>19}{'undisturbed':>23}{'by CPU time':>19}{'idle':>20}"
            "  pictures of each"
        )
        rows = [
            f"{one.world_size:>9}{one.images_per_second:>10.3g}{format_spread(one.speedup):>19}{_undisturbed(one):>23}"
            f"{format_spread(one.cpu_speedup):>19}{_percent(one.idle_share):>20}  {', '.join(map(str, one.loads))}"
            + (f"  (more processes than the {self.cores} cores)" if one.world_size > self.cores else "")
            for one in self.processes
        ]
        repeats = len(self.processes[0].timing.seconds)
        title = f"real processes over gloo, one thread each: {self.model}; {repeats} interleaved repetitions, quartiles"
        return ["", title, head, "-" * len(head), *rows]


def _without_loads(point: Generated) -> dict[str, object]:
    return {name: value for name, value in asdict(point).items() if name != "loads"}


def format_bytes(count: float) -> str:
    """Writes a number of bytes.

    Args:
        count: The number.

    Returns:
        It in the largest unit of which it is at least one.
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _undisturbed(one: Processes) -> str:
    """The speed-up of repetitions in which nothing else ran, and their number."""
    return "none" if one.quiet_speedup is None else f"{format_spread(one.quiet_speedup)}, {one.num_quiet}"


def _percent(value: Spread) -> str:
    return f"{value.median:.1%} ({value.low:.1%}-{value.high:.1%})"
