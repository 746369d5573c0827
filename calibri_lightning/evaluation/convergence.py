"""The convergence plot: reward in training and validation, and the pace of the run, over the images generated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibri_lightning.evaluation.figure import (
    BLUE,
    DPI,
    FAINT,
    GREEN,
    GRID,
    INK,
    ORANGE,
    PAPER,
    apart,
    heading,
    quiet,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Convergence:
    """What a run logged; all vectors of one group have one length.

    Attributes:
        images: int[G], images generated and scored up to the end of each generation.
        train: float[G], mean reward of each generation, on its own few prompts; NaN for one that failed.
        pace: float[G], what shows how fast the run moves: a search's step size, for example.
        validation_images: int[V], images generated for training at each validation.
        validation: float[V], mean reward of the search's mean on the fixed validation prompts.
        base: Reward of the uncalibrated model on the validation prompts.
        chosen: (images, reward) of the vector that was kept.
        reward_name: Name of the reward.
        pace_name: What the pace is; sigma is written as σ.
    """

    images: ArrayLike
    train: ArrayLike
    pace: ArrayLike
    validation_images: ArrayLike = ()
    validation: ArrayLike = ()
    base: float | None = None
    chosen: tuple[float, float] | None = None
    reward_name: str = "reward"
    pace_name: str = "sigma"


def plot_convergence(path: str | Path, run: Convergence, title: str = "Convergence") -> None:
    """Draw mean reward, in training and validation, and the pace over the images generated, as a PNG.

    Args:
        path: The PNG to write.
        run: What the run logged.
        title: Heading of the picture.

    Raises:
        ValueError: If the vectors of a group differ in length.
    """
    from matplotlib.figure import Figure

    images, train, pace = (np.asarray(v, dtype=np.float64) for v in (run.images, run.train, run.pace))
    counts = [len(images), len(train), len(pace)]
    if len(set(counts)) > 1:
        raise ValueError(f"{counts} values of images, train and pace; give one of each a generation")
    checks = [np.size(run.validation_images), np.size(run.validation)]
    if len(set(checks)) > 1:
        raise ValueError(f"{checks} values of validation_images and validation; give one of each a validation")
    width, height = 7.2, 4.6
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    heading(figure, title, f"mean {run.reward_name} over images generated and scored", width, height)
    reward = figure.add_axes((0.09, 0.38, 0.745, 0.46))
    step = figure.add_axes((0.09, 0.11, 0.745, 0.18), sharex=reward)
    _draw_reward(reward, run, images, train)
    step.plot(images, pace, "-o" if len(images) < 3 else "-", color=INK, linewidth=1.2, markersize=3)
    step.set_ylabel("step size σ" if run.pace_name == "sigma" else run.pace_name, size=8, color=INK)
    step.set_ylim(bottom=0)
    step.set_xlabel("images", size=8, color=INK)
    for axes in (reward, step):
        quiet(axes)
        axes.tick_params(labelsize=7.5)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlim(0, 1.02 * float(np.nanmax(np.append(images, 1.0))))
    reward.tick_params(labelbottom=False)
    step.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    save(figure, path)


def _draw_reward(axes: Axes, run: Convergence, images: NDArray[np.float64], train: NDArray[np.float64]) -> None:
    """Training as faint points with their running mean, validation on top; names at the ends of the lines."""
    ends = []
    finite = np.isfinite(train)
    if finite.any():
        smooth = _running_mean(train[finite])
        axes.plot(images[finite], train[finite], ".", color=BLUE, alpha=0.4, markersize=4.5, markeredgewidth=0)
        axes.plot(images[finite], smooth, color=BLUE, linewidth=1.4)
        ends.append((float(smooth[-1]), "training\n(other prompts)", BLUE))
    known = np.isfinite(np.asarray(run.validation, dtype=np.float64))
    if known.any():
        validation, spent = np.asarray(run.validation)[known], np.asarray(run.validation_images)[known]
        axes.plot(spent, validation, "-o", color=ORANGE, lw=1.8, ms=4.5, mew=0)
        ends.append((float(validation[-1]), "validation", ORANGE))
    if run.base is not None and np.isfinite(run.base):
        axes.axhline(run.base, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        ends.append((run.base, "base, validation", FAINT))
    if run.chosen is not None and np.isfinite(run.chosen[1]):
        axes.plot(*run.chosen, "o", clip_on=False, zorder=5, ms=10, mfc="none", mec=GREEN, mew=1.6)
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "bottom"}
        axes.annotate("kept", run.chosen, (-4, 6), size=8, weight="bold", color=GREEN, **place)
    axes.margins(y=0.12)
    axes.autoscale_view()
    low, high = axes.get_ylim()
    for y, name, colour in apart(ends, 0.085 * (high - low)):
        axes.text(1.015, (y - low) / (high - low), name, transform=axes.transAxes, size=8, color=colour, va="center")


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred mean over a tenth of the run, at its ends over the half that exists."""
    half = max(len(values) // 20, 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    start, stop = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)
