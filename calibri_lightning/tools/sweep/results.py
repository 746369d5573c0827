"""The results of a sweep as table, CSV and plot."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from calibri_lightning.atomic import replacing
from calibri_lightning.evaluation.text import format_interval
from calibri_lightning.tools.pictures import few_prompts
from calibri_lightning.tools.sweep.points import Finding, Sweep

COLUMNS = ("which", "steps", "guidance", "forwards", "reward", "mean", "low", "high")
MORE = ("difference", "difference_low", "difference_high", "reaches", "recommended")


def write_sweep(folder: Path, sweeps: Mapping[str, Sweep], reward: str, title: str) -> None:
    """Writes sweep.csv and sweep.png, and prints the table.

    Args:
        folder: Where to; it exists.
        sweeps: The sweep by every reward.
        reward: The one that the run optimises, by which the point is recommended.
        title: What was swept.
    """
    from calibri_lightning.tools.sweep.plot import plot_sweep

    with replacing(folder / "sweep.csv") as temporary:
        write_csv(temporary, sweeps)
    plot_sweep(folder / "sweep.png", sweeps[reward], reward, title)
    print(render(sweeps[reward], reward, title))
    print(f"\nTable, pictures' numbers and plot: {folder}")


def write_csv(path: Path, sweeps: Mapping[str, Sweep]) -> None:
    """Writes a row for every reward and point.

    Args:
        path: The file.
        sweeps: The sweep by every reward.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, *MORE])
        for name, sweep in sweeps.items():
            for finding in sweep.findings:
                point, mean, change = finding.point, finding.reward, finding.difference
                guidance = "" if point.guidance is None else f"{point.guidance:g}"
                numbers = (mean.mean, mean.low, mean.high, change.mean, change.low, change.high)
                cells = [repr(float(number)) if np.isfinite(number) else "" for number in numbers]
                head = [point.which, point.num_steps, guidance, point.num_forwards, name]
                writer.writerow([*head, *cells, int(finding.reaches), int(finding is sweep.recommended)])


def render(sweep: Sweep, reward: str, title: str) -> str:
    """Writes a sweep as text: every point, and then what to use.

    Args:
        sweep: The sweep.
        reward: The reward.
        title: What was swept.

    Returns:
        Lines.
    """
    width = max(len(finding.point.label) for finding in sweep.findings)
    lines = [f"{title}: {reward}", "", f"{'':{width}}  {'forwards':>8}  {'mean':<24}  against the base's best"]
    for finding in sweep.findings:
        point = finding.point
        mean, change = format_interval(finding.reward), format_interval(finding.difference, signed=True)
        if finding is sweep.best:
            change = "(the base's best)"
        mark = "  <- recommended" if finding is sweep.recommended else ""
        lines.append(f"{point.label:{width}}  {point.num_forwards:>8}  {mean:<24}  {change}{mark}")
    return "\n".join([*lines, "", advice(sweep), *(f"\n{line}" for line in few_prompts(sweep.best.reward.count))])


def advice(sweep: Sweep) -> str:
    """Says in a sentence or two which point to use.

    Args:
        sweep: The sweep.

    Returns:
        The text.
    """
    best = sweep.best.point
    if sweep.best.reward.count < 2:
        return "One prompt has no interval, so nothing is recommended. Take more."
    if sweep.recommended is None:
        text = f"No point reaches the base's best ({best.label}, {best.num_forwards} forwards), so none is recommended."
        nearest = max(sweep.candidates, key=lambda finding: np.nan_to_num(finding.difference.mean, nan=-np.inf))
        return f"{text} Nearest: {_use(nearest)}, {format_interval(nearest.difference, signed=True)}."
    text = (
        f"Recommended: {_use(sweep.recommended)}: the fewest forwards whose interval reaches the base's best "
        f"({best.label}, {best.num_forwards} forwards)."
    )
    if sweep.proven is None:
        return f"{text} No interval lies wholly at or above it; more prompts may tell."
    if sweep.proven is sweep.recommended:
        return f"{text} The whole interval does."
    return f"{text} Of {_use(sweep.proven)}, the whole interval does."


def _use(finding: Finding) -> str:
    return f"{finding.point.label}, {finding.point.num_forwards} forwards a picture"
