"""The picture of a sweep: reward over forwards, a curve for each guidance, against the best of the base.

It shows what decides: paired differences, whose intervals are far narrower than those of the means, and 0, which the
recommended point's interval reaches.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibri_lightning.evaluation import figure as style
from calibri_lightning.tools.sweep.points import Finding, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES = ("-", "--", ":", "-.")
_APART = 0.006
"""Share of the width by which intervals of neighbouring curves stand apart."""


def plot_sweep(path: Path, sweep: Sweep, reward: str, title: str) -> None:
    """Draws the difference to the base's best, with its interval, over the forwards of a picture, as a PNG.

    Args:
        path: The PNG.
        sweep: The sweep.
        reward: Name of the reward.
        title: What was swept.
    """
    curves = list(dict.fromkeys((f.point.which, f.point.guidance) for f in sweep.findings))
    guidances = list(dict.fromkeys(guidance for _, guidance in curves))
    best = f"{title}; the base's best is {sweep.best.point.label}, {sweep.best.reward.mean:.3g}"
    ring = "no point's interval reaches 0" if sweep.recommended is None else "ring: the fewest whose interval reaches 0"
    note = f"paired differences with 95 % intervals; {ring}"
    head = f"Reward ({reward}) less the base's best, over forwards a picture"
    with style.sheet(path, 7.2, 4.2, head, best, note) as figure:
        axes = figure.add_axes((0.09, 0.13, 0.67, 0.67))
        axes.axhline(0, color=style.FAINT, linewidth=0.8)
        xs = sorted({f.point.num_forwards for f in sweep.findings})
        ends = []
        for number, (which, guidance) in enumerate(curves):
            own = [f for f in sweep.findings if (f.point.which, f.point.guidance) == (which, guidance)]
            own.sort(key=lambda f: f.point.num_forwards)
            colour = style.ORANGE if which == "base" else style.BLUE
            dash = _DASHES[guidances.index(guidance) % len(_DASHES)]
            x = [_place(f, number - (len(curves) - 1) / 2, xs[-1]) for f in own]
            y = [f.difference.mean for f in own]
            axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.4, marker="o", markersize=3.5)
            axes.vlines(
                x, [f.difference.low for f in own], [f.difference.high for f in own], color=colour, linewidth=0.8
            )
            ends.append((float(y[-1]), _name(which, guidance), colour))
            if sweep.recommended in own:
                _ring(axes, x[own.index(sweep.recommended)], sweep.recommended)
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.set_xlim(0, 1.03 * xs[-1])
        axes.set_xlabel("forwards a picture (steps x members)", size=8, color=style.INK)
        style.ruled(axes)
        style.name_ends(axes, ends)


def _place(finding: Finding, rank: float, widest: int) -> float:
    """Where a point stands: beside those of the other curves with as many forwards."""
    return finding.point.num_forwards + _APART * rank * widest


def _ring(axes: Axes, x: float, finding: Finding) -> None:
    """Marks the recommended point."""
    edge: dict[str, Any] = {"markeredgecolor": style.GREEN, "markeredgewidth": 1.8, "markerfacecolor": "none"}
    axes.plot(x, finding.difference.mean, marker="o", markersize=11, **edge)


def _name(which: str, guidance: float | None) -> str:
    return which if guidance is None else f"{which}, g {guidance:g}"
