"""The results of an ablation: paired differences with bootstrap intervals, as CSV, table and plots."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibri_lightning.atomic import replacing
from calibri_lightning.evaluation.bootstrap import Interval, mean_interval, paired_interval
from calibri_lightning.evaluation.text import format_interval
from calibri_lightning.tools.ablate.conditions import UNTOUCHED, Level
from calibri_lightning.tools.pictures import DISTANCE, Scores, few_prompts

COLUMNS = ("site", "level", "reward", "mean", "difference", "low", "high", "distance", "distance_low", "distance_high")
_TAIL = 0.025
"""Of a 95 % interval, at either end."""
MOST_LINES = 5
"""Parts that the table in the terminal names at either end."""


@dataclass(frozen=True)
class Finding:
    """One condition."""

    point: Level
    """Which part, at which level."""
    means: dict[str, float]
    """Mean of every reward."""
    differences: dict[str, Interval]
    """Every reward less that of the untouched model on the same prompt and noise."""
    distance: Interval
    """How far its pictures are from those of the untouched model: root mean square over pixels, 0 to 1."""


@dataclass(frozen=True)
class Results:
    """All conditions; the first is the untouched model."""

    findings: tuple[Finding, ...]
    """In the order of the model."""
    reward: str
    """The reward that the run optimises; the plots show it."""

    @classmethod
    def of(cls, points: tuple[Level, ...], scores: Scores, reward: str) -> Results:
        """Computes the intervals.

        Args:
            points: The K conditions.
            scores: Their numbers.
            reward: The reward to plot.

        Returns:
            The results.
        """
        found = []
        for row, point in enumerate(points):
            rewards = {name: scores.values[name] for name in scores.rewards}
            means = {name: mean_interval(v[row], scores.clusters, num_resamples=1).mean for name, v in rewards.items()}
            differences = {name: paired_interval(v[row], v[0], scores.clusters) for name, v in rewards.items()}
            found.append(
                Finding(point, means, differences, mean_interval(scores.values[DISTANCE][row], scores.clusters))
            )
        return cls(tuple(found), reward)

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels of a part, from the lowest up."""
        return tuple(sorted({finding.point.level for finding in self.findings[1:]}))

    def at(self, level: float) -> tuple[Finding, ...]:
        """The findings of all parts at one level."""
        return tuple(finding for finding in self.findings[1:] if finding.point.level == level)


def distances_per_unit(points: tuple[Level, ...], scores: Scores, scales: Mapping[str, float]) -> dict[str, float]:
    """Says how far the picture moves for a unit of each part's scale, near the untouched model.

    Args:
        points: The K conditions.
        scores: Their numbers.
        scales: By part, the scale that a level multiplies: 1, or what a run found.

    Returns:
        By part: the root mean square over prompts and the nearest levels, of the distance over the change of scale.
        Parts of scale 0, which no level changes, and parts of which every picture failed are left out.
    """
    changes = np.array([point.level - 1.0 for point in points])
    nearest = np.abs(changes[1:]).min()
    squares: dict[str, list[float]] = {}
    for point, change, distances in zip(points, changes, scores.values[DISTANCE], strict=True):
        if point.site != UNTOUCHED and scales[point.site] and np.isclose(abs(change), nearest):
            per_unit = distances[np.isfinite(distances)] / (change * scales[point.site])
            squares.setdefault(point.site, []).extend(per_unit**2)
    return {site: float(np.sqrt(np.mean(values))) for site, values in squares.items() if values}


def write_results(folder: Path, results: Results, title: str) -> None:
    """Writes ablate.csv and the plots, and prints what matters most.

    Args:
        folder: Where to; it exists.
        results: The results.
        title: What was studied.
    """
    from calibri_lightning.tools.ablate.plot import plot_levels, plot_removed

    with replacing(folder / "ablate.csv") as temporary:
        write_csv(temporary, results)
    lowest = results.levels[0]
    plot_removed(folder / "ablate.png", results, lowest, title)
    plot_levels(folder / "levels.png", results, title)
    print(render(results, title))
    print(f"\nTable, pictures' numbers and plots: {folder}")


def write_csv(path: Path, results: Results) -> None:
    """Writes a row for every condition and reward.

    Args:
        path: The file.
        results: The results.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "pictures", "dropped"])
        for finding in results.findings:
            for name, change in finding.differences.items():
                away = finding.distance
                numbers = (finding.means[name], change.mean, change.low, change.high, away.mean, away.low, away.high)
                cells = [repr(float(number)) if np.isfinite(number) else "" for number in numbers]
                head = [finding.point.site, f"{finding.point.level:g}", name]
                writer.writerow([*head, *cells, change.count, change.dropped])


def render(results: Results, title: str) -> str:
    """Writes what matters most as text: where the lowest level costs most and least, and which change helps most.

    Args:
        results: The results.
        title: What was studied.

    Returns:
        Lines.
    """
    name, lowest = results.reward, results.levels[0]
    known = [finding for finding in results.at(lowest) if np.isfinite(finding.differences[name].mean)]
    order = sorted(known, key=lambda finding: finding.differences[name].mean)
    falling = sum(finding.differences[name].mean < 0 for finding in order)
    split = min(MOST_LINES, (len(order) + 1) // 2, falling)
    least = order[split:][-MOST_LINES:][::-1]
    sure = [finding for finding in results.findings[1:] if finding.differences[name].low > 0]
    best = sorted(sure, key=lambda finding: -finding.differences[name].mean)[:MOST_LINES]
    verb = "removed" if lowest == 0 else f"at {lowest:g}"
    lines = [f"{title}: {name} {results.findings[0].means[name]:.4g} untouched"]
    if split:
        lines += [f"\n{verb}, it costs most:", *(_line(finding, name) for finding in order[:split])]
    if least:
        lines += [f"\n{verb}, it costs least or helps:", *(_line(finding, name) for finding in least)]
    tried, few = len(results.findings) - 1, few_prompts(results.findings[0].differences[name].count)
    # With few prompts an interval misses what it should hold far more often than its level says.
    chance = f"; by chance alone {'many' if few else f'about {_TAIL * tried:.0f}'} would"
    counted = f"\nhelps, interval above 0 ({len(sure)} of {tried} changes{chance}):"
    lines.append(counted if best else "\nNo interval lies above 0.")
    lines += [f"{_line(finding, name)}, at {finding.point.level:g}" for finding in best]
    return "\n".join([*lines, *(f"\n{line}" for line in few)])


def _line(finding: Finding, name: str) -> str:
    change = format_interval(finding.differences[name], signed=True)
    return f"  {finding.point.site:<44} {change:<28} picture {finding.distance.mean:.3f} away"
