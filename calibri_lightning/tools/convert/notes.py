"""What a conversion cannot carry over, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from calibri_lightning.calibration import CalibrationFile
from calibri_lightning.tools.convert.orders import Kind

_GUIDED = (
    "The official code combines Qwen-Image's two velocities by their weights alone. The stock pipeline, and this "
    "program, then rescale the sum to the length of the prompt's velocity: pictures differ by that."
)


_PAIR, _SAME = (7.0, -6.0), (1.0, 0.0)
"""Start of the members' weights: of a guided pair, and of members that all see the prompt."""


def of_calibration(
    file: CalibrationFile, kind: Kind, unknown: Sequence[str] = (), outside: Sequence[str] = ()
) -> tuple[str, ...]:
    """Says what one should know of a calibration that came from an official checkpoint.

    Args:
        file: The calibration.
        kind: Family of its model.
        unknown: Keys of the checkpoint or its shapes that the official code at the described commit does not write.
        outside: Names of values beyond the bounds of the official search.

    Returns:
        Sentences.
    """
    said = [
        f"The checkpoint does not say which weights it was found on; that they are those of {file.model.name} is what "
        "--model says. Any model of this architecture and size will be accepted."
    ]
    if file.adapter is not None:
        said.append(
            f"It was found on the merged adapter {file.adapter.source}: load_calibration asks for it, and for a "
            "pipeline whose weights hold it already, pass check_adapter=False."
        )
    if unknown:
        said.append(
            f"It has {', '.join(str(key)[:40] for key in unknown[:5])}, of which nothing is known here, and "
            "which the way back will not write: it may be of another version of the official code."
        )
    if outside:
        said.append(
            f"{len(outside)} values, the first of them {outside[0]}, are beyond the bounds of the official search (-1 "
            "to 2 for scales, -10 to 10 for weights): the file may be damaged. Look at a few pictures before you "
            "trust it."
        )
    if kind == "sd3":
        said.append(_version(file))
    if kind != "qwen" or file.official is None:
        return tuple(said)
    dead = [scale for scale in file.official.unused if scale.name not in file.names]
    inert = [scale for scale in file.official.unused if scale.name in file.names]
    searched = sum(scale.value != 1.0 for scale in inert)
    said += [
        f"{len(inert)} scales of MLPs have no effect in the official code and are 1 here, so that pictures are its own "
        f"({searched} of them were something else in the checkpoint).",
        f"{len(dead)} scales are left out, since they reach no output: "
        f"{', '.join(scale.name for scale in dead)}. All of these are kept under 'official' for the way back.",
        _GUIDED,
    ]
    return tuple(said)


def of_official(file: CalibrationFile, kind: Kind, acting: int) -> tuple[str, ...]:
    """Says what an official checkpoint does not hold of the calibration that it was made from.

    Args:
        file: The calibration.
        kind: Family of its model.
        acting: How many scales that the official code does not apply are not 1.

    Returns:
        Sentences.
    """
    said = ["The checkpoint does not say which model it is of: pass that on, too."]
    if file.adapter is not None:
        said.append(f"Nor does it name the adapter that the scales were found on: {file.adapter.source}.")
    if file.weights is not None:
        said.append(f"Nor does it say that they were found on {file.weights.described or 'trained weights'}.")
    if kind != "qwen":
        return tuple(said)
    if acting:
        said.append(
            f"The official code does not apply scales of Qwen-Image's MLPs. {acting} here are not 1 and will have no "
            "effect there: its pictures will be others."
        )
    return (*said, _GUIDED)


def _version(file: CalibrationFile) -> str:
    """Says that two versions of the official code wrote the same shapes, and which one the weights speak for."""
    values = dict(zip(file.names, file.values, strict=True))
    weights = [values[f"member{m}/weight"] for m in range(2)]
    said = (
        "An earlier version of the official code for SD3 wrote the same shapes for two members that both saw the "
        "prompt. This checkpoint is read as a guided pair (prompt, negative prompt), as the present version searches "
        f"them. Its weights, {weights[0]:g} and {weights[1]:g}, are nearer to "
    )
    if math.dist(weights, _PAIR) < math.dist(weights, _SAME):
        return f"{said}the 7 and -6 at which pairs start than to the 1 and 0 of the earlier version."
    return (
        f"{said}the 1 and 0 at which members of the earlier version start than to the 7 and -6 of pairs. If it is of "
        "that version, this calibration is WRONG: look at a few pictures before you trust it."
    )
