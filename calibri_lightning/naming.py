"""What a configuration may name briefly, and what it is told when a name or a value is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields

from calibri_lightning.backbones import FLUX1, FLUX2, SD3, Krea2, Lumina2, QwenImage, Stock, ZImage
from calibri_lightning.rewards.finding import RewardConfig
from calibri_lightning.sampling.kernels import CPS, DanceSDE, FlowSDE
from calibri_lightning.sampling.windows import AllSteps, RandomWindow, SlidingWindow
from calibri_lightning.strategies import CMAES, Alternate, DiffusionNFT, FlowGRPO, PairES

BACKBONES = (SD3, FLUX1, FLUX2, QwenImage, ZImage, Lumina2, Krea2, Stock)
STRATEGIES = (PairES, CMAES, FlowGRPO, DiffusionNFT, Alternate)
KERNELS, WINDOWS = (FlowSDE, DanceSDE, CPS), (AllSteps, RandomWindow, SlidingWindow)
SHORT_NAMES = (*BACKBONES, *STRATEGIES, *KERNELS, *WINDOWS)
"""Classes that a configuration may name without their module."""

_OF_KEY: Mapping[str, tuple[type, ...]] = {
    "backbone": BACKBONES,
    "strategy": STRATEGIES,
    "kernel": KERNELS,
    "window": WINDOWS,
}
_REWARD_KEYS = tuple(field.name for field in fields(RewardConfig))
_REWARD_RULE = (
    "each reward has a weight, {pickscore: 1.0}, or some of the keys "
    f"{', '.join(_REWARD_KEYS)}: {{pickscore: {{weight: 1.0, options: {{dtype: bfloat16}}}}}}"
)
_KEY = re.compile(r"\"([\w.]+)\": (?:Problem with given class_path '[^']+': )?")
"""What jsonargparse puts before a reason, once for each level of the configuration."""


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
        return f"model.rewards does not take {text.rpartition(' value: ')[2]}; {_REWARD_RULE}"
    if '"model.held_out"' in text:
        return (
            f"model.held_out does not take {text.rpartition(' value: ')[2]}; it is a list of names, [clipscore, "
            "hpsv2], or names with options or null: {clipscore: null, hpsv2: {options: {dtype: bfloat16}}}. The keys "
            f"of a reward are {', '.join(_REWARD_KEYS)}"
        )
    if '"model.rows_per_forward"' in text:
        return f"model.rows_per_forward does not take {text.rpartition(' value: ')[2]}; it is a whole number, or auto"
    key, reason = _split(text)
    if "against any of the Union subtypes" in reason:
        return _explain_optional(key, reason)
    if "Expected a dot import path" in reason:
        return f"{text} ({_built_in(key)})"
    return text


def _split(text: str) -> tuple[str, str]:
    """Full name of the setting, and what is wrong with it."""
    names = []
    while (found := _KEY.match(text)) is not None:
        names.append(found[1])
        text = text[found.end() :]
    return ".".join(names), text


def _explain_optional(key: str, reason: str) -> str:
    """Says what is wrong with a setting that is one of some classes, or null: jsonargparse tells all that it tried."""
    nested = re.search(r"Given value: NestedArg\(key='([^']+)', val=(.*)\)$", reason)
    unknown = re.search(r"Option '([^']+)' is not accepted", reason)
    if unknown is not None:
        return f"{key} has no option '{unknown[1]}'"
    if nested is not None and "is abstract" in reason:
        return f"{key}.{nested[1]} is given, but not what {key} is: name it first, --{key} NAME ({_built_in(key)})"
    if nested is not None:
        return f"{key}.{nested[1]} does not take {nested[2]}"
    kinds = re.findall(r"<class '(?:\w+\.)*(\w+)'>", reason.partition(" Errors: ")[0])
    wanted = ", ".join(kind for kind in kinds if kind != "NoneType")
    known = _built_in(key) if key.rpartition(".")[2] in _OF_KEY else f"it takes {wanted}"
    return f"{key} does not take {reason.rpartition(' Given value: ')[2]}; {known}, or null"


def _built_in(key: str) -> str:
    names = ", ".join(known.__name__ for known in _OF_KEY.get(key.rpartition(".")[2], SHORT_NAMES))
    return f"built in are {names}; others go as package.module.Class"
