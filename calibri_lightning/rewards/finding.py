"""Rewards by name: the built-in ones, anything importable, and the options that a configuration gives them."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from calibri_lightning.errors import UserError
from calibri_lightning.rewards.base import FunctionReward, Reward

BUILT_IN: Mapping[str, str] = {
    "shapes": "calibri_lightning.rewards.shapes:ShapesReward",
    "pickscore": "calibri_lightning.rewards.pickscore:PickScore",
    "clipscore": "calibri_lightning.rewards.clipscore:ClipScore",
    "hpsv2": "calibri_lightning.rewards.hpsv2:HpsV2",
    "aesthetic": "calibri_lightning.rewards.aesthetic:Aesthetic",
    "clip_iqa": "calibri_lightning.rewards.clip_iqa:ClipIqa",
    "jpeg_compressibility": "calibri_lightning.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "calibri_lightning.rewards.jpeg:JpegIncompressibility",
    "vqascore": "calibri_lightning.rewards.vqa:VQAScore",
    "soft_tifa": "calibri_lightning.rewards.vqa:SoftTifa",
    "ocr": "calibri_lightning.rewards.ocr:Ocr",
    "remote": "calibri_lightning.rewards.remote:RemoteReward",
}
"""Rewards that go by a short name, and their import paths."""
OnFailure = Literal["raise", "nan"]
"""What happens when a reward raises."""


@dataclass(frozen=True)
class RewardConfig:
    """A reward's weight together with its options.

    Attributes:
        weight: Weight in the sum; 0 reports the reward without optimising it.
        options: Arguments of the reward's class by name, for instance {dtype: bfloat16}.
        reward: What it is, a built-in name or an import path, where it goes by another name here: `remote`, for
            instance, or one model under two names.
        floor: Scores below count as this in the sum, so that nothing is gained by more of what is bad enough already.
        cap: Scores above count as this in the sum: what is good enough is not pushed further, where models are hacked.
        on_failure: raise ends the run when the reward raises; nan goes on, and counts the pictures of that call as
            failed. Mistakes of the configuration end the run in any case.
    """

    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    reward: str | None = None
    floor: float | None = None
    cap: float | None = None
    on_failure: OnFailure = "raise"

    def check(self, name: str) -> None:
        """Checks the numbers.

        Args:
            name: The reward's name, for the message.

        Raises:
            UserError: If one is out of range.
        """
        for what, value in (("weight", self.weight), ("floor", self.floor), ("cap", self.cap)):
            if value is None and what != "weight":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(
                    f"The {what} of the reward {name!r} is {value!r}; it must be a finite number, such as 1.0."
                )
        if self.floor is not None and self.cap is not None and self.floor >= self.cap:
            raise UserError(
                f"The reward {name!r} has the floor {self.floor:g} and the cap {self.cap:g}; the floor must be below "
                "the cap, or all pictures would count the same."
            )
        if self.on_failure not in get_args(OnFailure):
            raise UserError(f"on_failure of the reward {name!r} is {self.on_failure!r}; it is raise or nan.")


def find_reward(name: str, options: Mapping[str, Any] | None = None, called: str | None = None) -> Reward:
    """Finds one reward, and makes it.

    Args:
        name: A built-in name or an import path "package.module:name".
        options: Arguments of the reward's class; only a class takes any.
        called: Its name in configurations and logs, where that is another one.

    Returns:
        The reward.

    Raises:
        UserError: If there is none of that name, or it does not take these options.
    """
    found = _look_up(name, options or {})
    made = found(**(options or {})) if isinstance(found, type) else found
    if isinstance(made, Reward):
        if called is not None and called not in (made.name, name):
            # A copy: one that was imported belongs to somebody.
            made = copy.copy(made)
            made.rename(called)
        return made
    if callable(made):
        return FunctionReward(called or name, made)
    raise UserError(
        f"The reward {name!r} is a {type(made).__name__}; it must be a Reward or a function (images, "
        "prompts) -> scores."
    )


def check_reward(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuses a reward that cannot be found or reached: cheap enough to run before any model is loaded.

    Args:
        name: A built-in name or an import path "package.module:name".
        options: Arguments of the reward's class.

    Raises:
        UserError: If there is none of that name, it has no such options, or its servers cannot be reached.
    """
    found = _look_up(name, options or {})
    if isinstance(found, type) and issubclass(found, Reward):
        found.check_options(options or {})


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
