"""Networks that describe pictures, for distances between sets of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calibri_lightning.backbones.loading import DType, first_line, torch_dtype
from calibri_lightning.errors import UserError
from calibri_lightning.metrics.pictures import to_bytes, to_float
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.base import Reward, features_checked
from calibri_lightning.rewards.finding import find_reward
from calibri_lightning.rewards.pixels import to_pixels

Pooling = Literal["cls", "mean", "pooled"]
"""What becomes of a vision model's tokens: the first one, their mean, or what the model itself makes of them."""


class FeatureNetwork(nn.Module):
    """Describes pictures by numbers; takes uint8 and floating point alike, and hands on what its network wants.

    As `feature=` of torchmetrics' FID and KID. It stays in evaluation mode and keeps no gradients.

    Attributes:
        num_features: Numbers of one picture.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        describe: Callable[[Tensor], Tensor],
        num_features: int | None = None,
        takes: Literal["float32", "uint8"] = "float32",
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        side: int = 224,
        batch_size: int = 32,
    ) -> None:
        """Wraps a network.

        Args:
            describe: A module or function, pictures [B, 3, H, W] to [B, num_features].
            num_features: Numbers of one picture; by default one grey picture is described to find out.
            takes: What it takes: float32 in 0..1 before `mean` and `std`, or uint8.
            mean: Subtracted from each channel of floats.
            std: Divides each channel of floats after that.
            side: Side of that grey picture in pixels.
            batch_size: Pictures of one forward.

        Raises:
            UserError: If batch_size is below 1, or uint8 is to be normalised.
        """
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be a number from 1 up.")
        if takes == "uint8" and (any(mean) or any(value != 1 for value in std)):
            raise UserError("A network that takes uint8 gets pictures as they are. Leave out mean and std.")
        self._describe, self._takes, self._batch_size = describe, takes, batch_size
        self.register_buffer("_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.eval()
        grey = torch.full((1, 3, side, side), 0.5)
        self.num_features = self(grey).shape[1] if num_features is None else num_features

    @classmethod
    def from_reward(
        cls, reward: str | Reward, prompt: str | Prompt, options: Mapping[str, Any] | None = None, side: int = 64
    ) -> FeatureNetwork:
        """Describes pictures of one prompt by the features of a reward.

        Args:
            reward: A built-in name, an import path, or a reward.
            prompt: The prompt of all pictures; what features mean depends on it.
            options: Arguments of a named reward's class.
            side: Side in pixels of a picture that the reward can describe.

        Returns:
            The network.

        Raises:
            UserError: If the reward has no features.
        """
        found = reward if isinstance(reward, Reward) else find_reward(reward, options)
        return cls(_RewardFeatures(found, Prompt(prompt, 0) if isinstance(prompt, str) else prompt), side=side)

    @classmethod
    def from_pretrained(
        cls, folder: str, pooling: Pooling = "cls", revision: str | None = None, dtype: DType = "float32"
    ) -> FeatureNetwork:
        """Describes pictures by a vision model of transformers, with its own preprocessing.

        Args:
            folder: A folder or a Hub id, for instance facebook/dino-vits16 or a CLIP model.
            pooling: What becomes of its tokens.
            revision: Branch, tag or commit on the Hub.
            dtype: Type of weights and activations.

        Returns:
            The network.

        Raises:
            UserError: If it cannot be loaded, or has no such output.
        """
        network = _VisionModel(folder, pooling, revision, torch_dtype(dtype))
        return cls(network, side=network.side)

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stays in evaluation mode: a loop that trains its own model must not change what describes pictures.

        Args:
            mode: Unused.

        Returns:
            Itself.
        """
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Describes pictures.

        Args:
            images: [B, 3, H, W], uint8 or floating point in 0..1.

        Returns:
            float32 [B, num_features].

        Raises:
            UserError: If they are no pictures, or one of them cannot be described: a distance of sets cannot leave out
                a member.
        """
        pictures = to_float(images)
        pictures = to_bytes(pictures) if self._takes == "uint8" else (pictures - self._mean) / self._std
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            values = torch.cat([self._describe(part) for part in pictures.split(self._batch_size)]).float()
        if values.ndim != 2 or len(values) != len(images):
            raise UserError(
                f"The network made {list(values.shape)} of {len(images)} pictures; the rule is [{len(images)}, F]. "
                "Pool or flatten its output."
            )
        lost = int((~values.isfinite().all(dim=1)).sum())
        if lost:
            raise UserError(
                f"{lost} of {len(images)} pictures have features that are not finite, and a distance between sets "
                "cannot leave any out. Look at these pictures, and drop them from both sets."
            )
        return values


@dataclass(frozen=True)
class _RewardFeatures:
    """The features of a reward for one prompt; a class, so that it can be pickled."""

    reward: Reward
    prompt: Prompt

    def __call__(self, images: Tensor) -> Tensor:
        values = features_checked(self.reward, images, [self.prompt] * len(images))
        if values is None:
            raise UserError(f"The reward {self.reward.name!r} has no features. Take a vision model: from_pretrained.")
        return values


class _VisionModel(nn.Module):
    """A vision model with its preprocessing: float32 [B, 3, H, W] in 0..1 to its features."""

    def __init__(self, folder: str, pooling: Pooling, revision: str | None, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        try:
            # Pillow's preprocessing, whether or not torchvision is installed: features must not depend on that.
            self._processor = AutoImageProcessor.from_pretrained(folder, revision=revision, backend="pil")
            whole, report = AutoModel.from_pretrained(
                folder, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        # The Hub client, safetensors and transformers raise dozens of unrelated classes.
        except Exception as error:
            raise UserError(
                f"The vision model {folder!r} could not be loaded ({first_line(error)}). Give a folder or a Hub id of "
                "a vision model of transformers with safetensors weights and its preprocessing."
            ) from error
        # Many models come without the pooler that the class has, and are used without it.
        absent = [name for name in report["missing_keys"] if pooling == "pooled" or "pooler" not in name]
        if absent:
            raise UserError(
                f"The vision model {folder!r} is incomplete: {len(absent)} tensors are absent, {min(absent)} first. "
                "Use another pooling than 'pooled' if it is the pooler's, or other weights."
            )
        model = getattr(whole, "vision_model", whole)
        self._model, self._pooling, self._folder = model.requires_grad_(False), pooling, folder
        self.side = 64

    def forward(self, images: Tensor) -> Tensor:
        pixels = self._processor(list(to_pixels(images)), return_tensors="pt")["pixel_values"]
        reference = next(self._model.parameters())
        answer = self._model(pixel_values=pixels.to(reference.device, reference.dtype))
        tokens = getattr(answer, "last_hidden_state", None)
        pooled = getattr(answer, "pooler_output", None)
        made = pooled if self._pooling == "pooled" else tokens
        if made is None or (self._pooling != "pooled" and made.ndim != 3):
            raise UserError(
                f"The vision model {self._folder!r} has no output for pooling {self._pooling!r}. Try another one of "
                "cls, mean, pooled; convolutional models have pooled alone."
            )
        if self._pooling == "cls":
            made = made[:, 0]
        elif self._pooling == "mean":
            made = made.mean(dim=1)
        result: Tensor = made.flatten(1).to(images.device)
        return result
