"""Rewards by name: the built-in ones, anything importable, and the options that a configuration gives them."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from calibri_lightning.errors import UserError
from calibri_lightning.rewards.base import FunctionReward, Reward

BUILT_IN: Mapping[str, str] = {
    "shapes": "calibri_lightning.rewards.shapes:ShapesReward",
    "pickscore": "calibri_lightning.rewards.pickscore:PickScore",
    "jpeg_compressibility": "calibri_lightning.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "calibri_lightning.rewards.jpeg:JpegIncompressibility",
    "remote": "calibri_lightning.rewards.remote:RemoteReward",
}
"""Rewards that go by a short name, and their import paths."""


@dataclass(frozen=True)
class RewardConfig:
    """A reward's weight together with its options.

    Attributes:
        weight: Weight in the sum; 0 reports the reward without optimising it.
        options: Arguments of the reward's class by name, for instance {dtype: bfloat16}.
    """

    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


def find_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Finds one reward, and makes it.

    Args:
        name: A built-in name or an import path "package.module:name".
        options: Arguments of the reward's class; only a class takes any.

    Returns:
        The reward.

    Raises:
        UserError: If there is none of that name, or it does not take these options.
    """
    found = _look_up(name, options or {})
    made = found(**(options or {})) if isinstance(found, type) else found
    if isinstance(made, Reward):
        return made
    if callable(made):
        return FunctionReward(name, made)
    raise UserError(
        f"The reward {name!r} is a {type(made).__name__}; it must be a Reward or a function (images, "
        "prompts) -> scores."
    )


def check_reward(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuses a reward that cannot be found, without making it: cheap enough to run before any model is loaded.

    Args:
        name: A built-in name or an import path "package.module:name".
        options: Arguments of the reward's class.

    Raises:
        UserError: If there is none of that name, or it has no such options.
    """
    _look_up(name, options or {})


def _look_up(name: str, options: Mapping[str, Any]) -> Any:
    found = _import(BUILT_IN.get(name, name))
    if isinstance(found, type):
        _check_options(name, found, options)
    elif options:
        raise UserError(
            f"The reward {name!r} is a {type(found).__name__} and takes no options, but has {', '.join(options)}. "
            "Leave them out, or write a class derived from calibri_lightning.rewards.Reward."
        )
    return found


def _import(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if not attribute:
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Check the spelling."
        raise UserError(
            f"There is no reward {name!r}; built in are {', '.join(BUILT_IN)}, and others go as "
            f"'package.module:name'. {hint}"
        )
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"The reward {name!r} cannot be imported ({error}). The module must be importable from where "
            "you run: check the "
            "name, or put its folder on PYTHONPATH."
        ) from error


def _check_options(name: str, cls: type, given: Mapping[str, Any]) -> None:
    """Refuses options that the class does not have, and missing ones that it needs."""
    parameters = inspect.signature(cls).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [] if any(p.kind is p.VAR_KEYWORD for p in parameters) else [key for key in given if key not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"The reward {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}.{hint}")
    needed = [p.name for p in parameters if p.name in known and p.default is p.empty and p.name not in given]
    if needed:
        raise UserError(
            f"The reward {name!r} needs the option {needed[0]!r}. Give it as {name}: {{weight: 1.0, options: "
            f"{{{needed[0]}: ...}}}}."
        )
