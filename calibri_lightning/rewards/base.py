"""What a reward is, and what happens when one fails.

A reward takes pictures and prompts and returns one number a picture; higher is better. It fails by raising or
by a value that is not finite, which travels on as NaN; never by 0, which would be a score.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.sampling.frames import middle_frame

RewardFunction = Callable[[Tensor, Sequence[Prompt]], Tensor]
"""Pictures float32 [B, 3, H, W] in 0..1 and their B prompts to B numbers."""


_log = logging.getLogger(__name__)


class RewardError(UserError):
    """A reward raised; the message names it and the cause."""


@dataclass(frozen=True)
class ModelInfo:
    """What gives the scores, so that two places can tell whether theirs mean the same.

    Attributes:
        model: A Hub id, a folder's name, or an import path.
        revision: Commit of the weights, or version of the code.
        preprocessing: What is done to a picture first; a change of it changes this name.
    """

    model: str
    revision: str
    preprocessing: str = "none"


class Reward(ABC):
    """Scores pictures."""

    name: str
    """Its name in configurations and logs."""
    extra_names: tuple[str, ...] = ()
    """Names of further metrics that come for free with the score; reported, never optimised."""
    takes_frames: bool = False
    """Whether it scores videos [B, F, 3, H, W]; others are given the middle frame of each."""
    pixels: Literal["uint8", "float32"] = "float32"
    """uint8 if it rounds pictures to 8 bits first: sending them to it as 8 bits then loses nothing."""
    concurrency: int = 1
    """Calls that it can answer at the same time, each from a thread of its own."""

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores pictures.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: The prompt of each picture.

        Returns:
            One floating-point number a picture [B]; higher is better, NaN where a picture cannot be scored.
        """

    def check(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027 - a reward need not object to anything
        """Refuses prompts that it cannot score; called with all prompts of a run before any work.

        Args:
            prompts: The prompts.

        Raises:
            UserError: If one cannot be scored; the message names it.
        """

    @classmethod  # noqa: B027 - most have nothing to look for
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Looks for what would fail later, before any model is loaded: servers that are not there, say.

        Args:
            options: Arguments of the class, which it takes.

        Raises:
            UserError: If something is wrong.
        """

    def prepare(self, device: torch.device) -> None:  # noqa: B027 - a reward need not have a model
        """Moves its model to where it will score, so that what is measured of the device's memory afterwards is right.

        Args:
            device: Where pictures will be.
        """

    def describe(self) -> ModelInfo:
        """Says what gives the scores; may load the model.

        Returns:
            The class and the version of this package, unless the reward knows better.
        """
        return ModelInfo(f"{type(self).__module__}:{type(self).__qualname__}", version("calibri-lightning"))

    def rename(self, name: str) -> None:
        """Gives it another name in configurations and logs; extra metrics that begin with the old one follow.

        Args:
            name: The new name.
        """
        prefix = f"{self.name}_"
        self.extra_names = tuple(
            f"{name}_{extra.removeprefix(prefix)}" if extra.startswith(prefix) else extra for extra in self.extra_names
        )
        self.name = name

    def recipe(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Says what its scores depend on; a run resumes only where that is unchanged.

        Args:
            options: The arguments with which it was made.

        Returns:
            Names and values: all options, unless the reward knows better.
        """
        return options

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """Scores pictures, with the extra metrics; override it together with `extra_names`.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: The prompt of each picture.

        Returns:
            [B] under the reward's own name and each of its `extra_names`.
        """
        return {self.name: self(images, prompts)}

    def features(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | None:
        """Describes pictures, so that the diversity of the samples of one prompt can be measured.

        A reward that knows what matters in a picture knows best what makes two pictures different. Without features,
        pictures are compared pixel by pixel.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: The prompt of each picture.

        Returns:
            [B, F], F the same for all prompts, scaled so that a Euclidean distance of 1 between two samples of a prompt
            is a visible difference (similarity 0.61) and one of 3 a complete one (0.01); NaN in the row of a picture
            that cannot be described. None if the reward has no features.
        """
        return None


class FunctionReward(Reward):
    """A plain function as a reward."""

    def __init__(self, name: str, function: RewardFunction) -> None:
        """Wraps a function.

        Args:
            name: Name in configurations and logs.
            function: Scores pictures; see `Reward.__call__`. With an attribute `takes_frames = True` it is given
                videos as they are.
        """
        self.name, self._function = name, function
        self.takes_frames = bool(getattr(function, "takes_frames", False))

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Calls the function.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: The prompt of each picture.

        Returns:
            What the function returns.
        """
        return self._function(images, prompts)


def measure_checked(
    reward: Reward, images: Tensor, prompts: Sequence[Prompt], on_failure: Literal["raise", "nan"] = "raise"
) -> dict[str, Tensor]:
    """Calls a reward and checks what it returns.

    A reward computes in its own precision, whatever that of the run (`trainer.precision: bf16-mixed`): differences of
    scores can be smaller than the steps of bfloat16.

    Args:
        reward: The reward.
        images: float32 [B, 3, H, W] in 0..1, or videos [B, F, 3, H, W].
        prompts: The prompt of each picture.
        on_failure: nan gives NaN for all pictures where the reward raises anything but a `UserError`.

    Returns:
        float32 [B] on the pictures' device under the reward's name and its `extra_names`, in this order;
        infinities have become NaN.

    Raises:
        RewardError: If the reward raises.
        UserError: If it returns something other than one number a picture.
    """
    names = (reward.name, *reward.extra_names)
    try:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            measured = reward.measure(images if reward.takes_frames else middle_frame(images), prompts)
    except UserError:
        raise
    except Exception as error:
        if on_failure == "nan":
            _log.warning(
                "The reward %r raised %s: %s. %d pictures count as failed.",
                reward.name,
                type(error).__name__,
                error,
                len(images),
            )
            return {name: torch.full((len(images),), torch.nan, device=images.device) for name in names}
        raise RewardError(
            f"The reward {reward.name!r} raised {type(error).__name__}: {error}. A reward scores any picture in 0..1; "
            "for a picture that it cannot score it returns NaN. Correct the reward, or let a run go on without such "
            "pictures: on_failure: nan."
        ) from error
    missing = [name for name in names if name not in measured]
    if missing:
        raise UserError(
            f"The reward {reward.name!r} did not report {', '.join(missing)}, which it announces. Correct "
            "its `measure`."
        )
    return {name: _check(reward.name, name, measured[name], images) for name in names}


def features_checked(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Tensor | None:
    """Asks a reward for features and checks what it returns.

    Args:
        reward: The reward.
        images: float32 [B, 3, H, W] in 0..1.
        prompts: The prompt of each picture.

    Returns:
        float32 [B, F] on the pictures' device, or None if the reward has no features.

    Raises:
        RewardError: If the reward raises.
        UserError: If it returns something other than one row a picture.
    """
    try:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            found = reward.features(images, prompts)
    except UserError:
        raise
    except Exception as error:
        raise RewardError(
            f"The features of the reward {reward.name!r} raised {type(error).__name__}: {error}. A picture that cannot "
            "be described has a row of NaN. Correct the reward, or test without diversity: "
            "--model.num_diversity_prompts=0."
        ) from error
    if found is None:
        return None
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images) or found.is_complex():
        kind = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise UserError(
            f"The features of the reward {reward.name!r} are {kind}; the rule is a real torch tensor [{len(images)}, "
            "F], one row a picture. Correct the reward."
        )
    return found.detach().to(images.device, torch.float32)


def _check(reward: str, name: str, scores: object, images: Tensor) -> Tensor:
    rule = f"the rule is a real torch tensor of shape [{len(images)}], one number a picture. Correct the reward."
    if not isinstance(scores, Tensor):
        raise UserError(f"The reward {reward!r} returned a {type(scores).__name__} for {name!r}; {rule}")
    if scores.shape != (len(images),) or scores.is_complex():
        kind = f"{str(scores.dtype).removeprefix('torch.')} {list(scores.shape)}"
        raise UserError(f"The reward {reward!r} returned a tensor {kind} for {name!r}; {rule}")
    values = scores.detach().to(images.device, torch.float32)
    return torch.where(values.isfinite(), values, torch.nan)
