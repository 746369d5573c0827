"""What a configuration may name briefly, and what it is told when a name or a value is wrong."""

from __future__ import annotations

from calibri_lightning.backbones import FLUX1, FLUX2, SD3, Krea2, Lumina2, QwenImage, Stock, ZImage
from calibri_lightning.strategies import CMAES, Alternate, DiffusionNFT, FlowGRPO, PairES

_BACKBONES = (SD3, FLUX1, FLUX2, QwenImage, ZImage, Lumina2, Krea2, Stock)
_STRATEGIES = (PairES, CMAES, FlowGRPO, DiffusionNFT, Alternate)
SHORT_NAMES = (*_BACKBONES, *_STRATEGIES)
"""Classes that a configuration may name without their module."""


def explain(message: str) -> str:
    """Shortens what jsonargparse says of a wrong configuration to what helps.

    Args:
        message: Its message.

    Returns:
        One line without a full stop.
    """
    text = " ".join(message.replace("Parser key ", "").split()).rstrip(".")
    if '"model.rewards"' in text:
        # What jsonargparse says of a union is a list of all that it tried; the value comes last.
        return (
            f"model.rewards does not take {text.rpartition(' value: ')[2]}; each reward has a weight, or a weight "
            "with options: {pickscore: 1.0} or {pickscore: {weight: 1.0, options: {dtype: bfloat16}}}"
        )
    if '"model.rows_per_forward"' in text:
        return f"model.rows_per_forward does not take {text.rpartition(' value: ')[2]}; it is a whole number, or auto"
    if "Expected a dot import path" in text:
        names = ", ".join(known.__name__ for known in SHORT_NAMES)
        return f"{text} (built in are {names}; others go as package.module.Class)"
    return text
