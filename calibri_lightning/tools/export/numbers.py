"""The numbers of a model card, from summary.json: means and paired differences with their intervals, and the cost."""

from __future__ import annotations

from calibri_lightning.evaluation.summary import Summary
from calibri_lightning.evaluation.text import format_interval
from calibri_lightning.tools.export.markdown import escape, table
from calibri_lightning.tools.finished import FinishedRun
from calibri_lightning.tools.lineage import Origin


def number_tables(summary: Summary) -> list[str]:
    """Writes the tables of a summary.

    Args:
        summary: What the test found.

    Returns:
        Lines of Markdown: means, then paired differences, then diversity.
    """
    rewards = [summary.reward, *(name for name in summary.conditions[0].rewards if name != summary.reward)]
    titles = [f"{escape(name)}{' (optimised)' if name == summary.reward else ''}" for name in rewards]
    level = f"{summary.level:.0%} interval"
    means = [
        [escape(c.name), str(c.num_forwards_per_image), *(format_interval(found[name]) for name in rewards)]
        for c, found in zip(summary.conditions, summary.means, strict=True)
    ]
    lines = [f"Means with their {level}; NFE are forwards of the transformer a picture.", ""]
    lines += table(["condition", "NFE", *titles], means)
    if summary.comparisons:
        lines += ["", f"Paired differences with their {level}, and the share of prompts won, tied and lost.", ""]
        lines += table(["compared", "reward", "difference", "win / tie / loss"], _differences(summary))
    if summary.diversity:
        lines += ["", f"Diversity of the samples of one prompt, with its {level}.", ""]
        lines += table(
            ["condition", "Vendi score", "pixel distance"],
            [
                [escape(c.name), format_interval(d.vendi, places=2), format_interval(d.pixel_distance, places=3)]
                for c, d in zip(summary.conditions, summary.diversity, strict=True)
            ],
        )
    return lines


def _differences(summary: Summary) -> list[list[str]]:
    rows = []
    for c in summary.comparisons:
        wins = c.wins
        shares = (
            " / ".join(f"{n / wins.count:.0%}" for n in (wins.wins, wins.ties, wins.losses)) if wins.count else "n/a"
        )
        compared = f"{escape(c.calibrated)} - {escape(c.base)} ({c.against})"
        rows.append([compared, escape(c.reward), format_interval(c.difference, signed=True), shares])
    return rows


def budget_lines(run: FinishedRun, start: Origin | None) -> list[str]:
    """Writes what a run cost.

    Args:
        run: The run.
        start: What it started from.

    Returns:
        Lines of Markdown.
    """
    lines = [f"- {run.calibration.obtained_by.images:,} training pictures drawn and scored"]
    # Only the run that made a calibration knows its whole cost.
    if run.budget is not None:
        lines += [
            f"- {run.budget.images:,} pictures with validation, {run.budget.forwards:,} forwards of one picture each",
            f"- {run.budget.device_seconds:,.0f} device-seconds",
        ]
    if start is None:
        return lines
    before = start.budget
    if before is None:
        return [*lines, "- On top of that, what it started from; that is not known in full."]
    return [
        *lines,
        f"- On top of that, what it started from: {before.images:,} pictures with validation, {before.forwards:,} "
        f"forwards, {before.device_seconds:,.0f} device-seconds",
    ]
