"""Whether runs may be compared, and what the report must say where they were not trained alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calibri_lightning.errors import UserError
from calibri_lightning.preflight import check_negatives
from calibri_lightning.prompts import Prompt
from calibri_lightning.tools.compare.runs import LabelledRun

_SAME = ("pretrained", "revision", "height", "width")
"""Settings of a backbone that make another model, or pictures of another size."""


def check_same_model(runs: Sequence[LabelledRun]) -> None:
    """Refuses runs of different models.

    Args:
        runs: One or more.

    Raises:
        UserError: If models or sizes of pictures differ.
    """
    first = runs[0]
    one = first.calibration.model
    for other in runs[1:]:
        two = other.calibration.model
        if one != two:
            raise UserError(
                f"The runs are of different models: {first.label} of {one.name} ({one.transformer_class}, "
                f"{one.num_parameters:,} parameters), {other.label} of {two.name} ({two.transformer_class}, "
                f"{two.num_parameters:,} parameters). Pictures of different models are not compared: leave one out."
            )
        for key in _SAME:
            mine, theirs = _options(first).get(key), _options(other).get(key)
            if mine != theirs:
                raise UserError(
                    f"The runs are of different models: model.backbone has {key} {mine} in {first.label} and {theirs} "
                    f"in {other.label}. Compare runs of one model and one size of pictures."
                )


def check_seen(runs: Sequence[LabelledRun], source: str, prompts: Sequence[Prompt]) -> None:
    """Refuses negative prompts that a run would not see, as the test of a run does.

    Args:
        runs: The runs.
        source: Where the prompts come from.
        prompts: The prompts.

    Raises:
        UserError: If prompts have negative prompts and every member of a run sees the prompt alone.
    """
    for run in runs:
        check_negatives(run.calibration.members, f"{source} (for the run {run.label})", prompts)


def notes(runs: Sequence[LabelledRun]) -> tuple[str, ...]:
    """Says how runs are drawn that were trained in different ways.

    Args:
        runs: All that are compared; the model is loaded as the first says.

    Returns:
        Sentences; none where all were trained alike.
    """
    first, found = runs[0], []
    guidance = {run.label: _guidance(run) for run in runs}
    if len(set(guidance.values())) > 1:
        each = "; ".join(f"{label}: {text}" for label, text in guidance.items())
        found.append(
            f"Runs differ in members ({each}). The base is drawn as {first.label} began. Equal NFE counts forwards, "
            "not steps."
        )
    for run in runs[1:]:
        mine, theirs = _drawn(first), _drawn(run)
        for key in sorted({*mine, *theirs}):
            if mine.get(key) != theirs.get(key):
                found.append(
                    f"{run.label} was trained with {key} {theirs.get(key)}; here all are drawn with {mine.get(key)}, "
                    f"as {first.label}."
                )
    for run in runs:
        if run.settings.precision != "32-true":
            found.append(
                f"{run.label} was trained under trainer.precision {run.settings.precision}; here all are drawn without "
                "autocast."
            )
    steps = {run.calibration.obtained_by.num_steps for run in runs}
    if len(steps) > 1:
        each = ", ".join(f"{run.label} {run.calibration.obtained_by.num_steps}" for run in runs)
        found.append(f"Runs were trained at different numbers of sampling steps: {each}.")
    return tuple(found)


def _guidance(run: LabelledRun) -> str:
    """Members and the weights that they began with."""
    members = run.calibration.members
    if len(members) == 1:
        return "1 member, no guidance"
    return f"{len(members)} members of weights {', '.join(f'{member.weight:g}' for member in members)}"


def _options(run: LabelledRun) -> Mapping[str, Any]:
    return run.settings.model["backbone"].get("init_args") or {}


def _drawn(run: LabelledRun) -> Mapping[str, Any]:
    """What of a backbone may change its pictures a little, and is taken from the first run."""
    options = {key: value for key, value in _options(run).items() if key not in (*_SAME, "memory")}
    quantization = (_options(run).get("memory") or {}).get("quantization")
    return {**options, **({"quantization": quantization} if quantization is not None else {})}
